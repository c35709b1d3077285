"""Headers are passed on to strangers: no folder of the user's is in one, and nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgpo_plugin.adapters import TrainingFacts, export_adapter, read_adapter
from dgpo_plugin.common.public_names import public_name, without_folders
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.policy import Policy
from tests.conftest import shapes_run

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-medium"),
        ("shapes", "shapes"),
        ("/home/jane doe/my models/sd3", "sd3"),
        ("/home/jane doe/my models/", "my models"),
        ("jane doe/my models", "my models"),
        ("jane doe/my models/sd3", "sd3"),
        ("./bases/sd3", "sd3"),
        ("../jane/sd3/", "sd3"),
        ("~/models/sd3", "sd3"),
        ("~jane/models/sd3", "sd3"),
        (r"C:\Users\jane doe\models\sd 3", "sd 3"),
        ("D:/jane/sd3", "sd3"),
        (r"\\server\jane\sd3", "sd3"),
        ("/home/jane/worlds.py:WORLD", "worlds.py:WORLD"),
        (
            "/x/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev/snapshots/3de6",
            "black-forest-labs/FLUX.1-dev",
        ),
        ("/mnt/jane/./sd3/.", "sd3"),
    ],
)
def test_a_base_is_named_by_its_hub_name_or_its_last_folder(path: str, name: str) -> None:
    assert public_name(path) == name


def test_a_relative_folder_that_looks_like_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jane" / "sd3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("jane/sd3") == "sd3"
    monkeypatch.chdir(tmp_path / "jane")
    assert public_name(".") == "jane"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "jane")
    assert public_name(".") == "."


@pytest.mark.parametrize(
    ("value", "cut"),
    [
        ("geneval/train", "geneval/train"),
        ("hf:owner/dataset:train:text", "hf:owner/dataset:train:text"),
        ("hf:/home/jane/data", "hf:data"),
        ("mine/train.txt", "train.txt"),
        ("/home/jane doe/own rewards/r.py:sharp", "r.py:sharp"),
        ("rewards/r.py:sharp", "r.py:sharp"),
        ("yuvalkirstain/PickScore_v1", "yuvalkirstain/PickScore_v1"),
        ("weights/HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.pt"),
        ("http://jane:secret@10.0.0.3:8000/v1/score", "http://10.0.0.3:8000/v1/score"),
        ("https://example.org/a/b.txt", "https://example.org/a/b.txt"),
        ("file:///home/jane/w.pt", "w.pt"),
        (r"Final Score: (\d+)/5", r"Final Score: (\d+)/5"),
        (r"(\d+)\s*/\s*(\d+)", r"(\d+)\s*/\s*(\d+)"),
        (r"\bscore\b/(\d)", r"\bscore\b/(\d)"),
        ("Rate it from 1/5 to 5/5 and/or explain", "Rate it from 1/5 to 5/5 and/or explain"),
        ("see /home/jane/notes/rules.md first", "see rules.md first"),
        (["a", "/home/jane/b"], ["a", "b"]),
        ({"k": ("/home/jane/b", 3, None, True)}, {"k": ["b", 3, None, True]}),
    ],
)
def test_values_lose_their_folders_and_nothing_else(value: object, cut: object) -> None:
    assert without_folders(value) == cut


def test_a_path_with_spaces_inside_a_text(tmp_path: Path) -> None:
    told = without_folders({"rewards": {"/home/jane doe/r.py:mine": 1}, "title": "1 /home/jane doe/r.py:mine + 2 ocr"})
    assert told == {"rewards": {"r.py:mine": 1}, "title": "1 r.py:mine + 2 ocr"}


def test_no_field_of_a_header_names_a_folder(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jane doe" / "my models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate(
        {
            "model": {"path": "jane doe/my models"},
            "prompts": {"train": "jane doe/prompts.txt", "held_out": "C:\\Users\\jane doe\\held.jsonl"},
            "rewards": {
                "jane doe/own.py:sharp": 1,
                "hps": {"reward": "hpsv2.1", "options": {"weights": "/home/jane doe/w.pt"}},
            },
        }
    )
    policy.model.path = "jane doe/my models"
    path = tmp_path / "out" / "mine.safetensors"
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(config, 1))
    header = read_adapter(path).header
    assert not [key for key, value in header.items() if "jane" in value]
    assert header["dgpo.base_model"] == json.loads(header["dgpo.config"])["model"]["path"] == "my models"
    assert header["dgpo.reward"] == "1 own.py:sharp + 1 hps"


def test_a_rewards_own_title_loses_the_configurations_folders() -> None:
    facts = TrainingFacts(shapes_run(rewards={"/data of jane/r.py:f": 1}), 1, reward="/data of jane/r.py:f (served)")
    assert facts.reward_name == "r.py:f (served)"
