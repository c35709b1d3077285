"""Places in a configuration: absolute when a run starts, relative inside its folder, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.places import absolute_places, file_and_name, is_url, may_be_path, places_in
from tests.conftest import shapes_run

pytestmark = pytest.mark.fast


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with something under every name that the tests use."""
    for folder in ("models/mine", "shapes", "train", "Qwen/VL"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("p.txt", "q.jsonl", "own.py", "w.pt", "sub/w.safetensors", "question.txt", "ocr", "weights"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x")
    return tmp_path


def option(name: str, value: Any) -> RunConfig:
    return shapes_run(rewards={"r": {"reward": "ocr", "options": {name: value}}})


def value_of(config: RunConfig, name: str) -> Any:
    return config.rewards["r"].options[name]


@pytest.mark.parametrize("path", ["models/mine", "./models/mine", "models/../models/mine"])
def test_a_model_that_lies_there(home: Path, path: str) -> None:
    assert absolute_places(shapes_run(model={"path": path}), home).model.path == str(home / path)


@pytest.mark.parametrize("path", ["shapes", "stabilityai/stable-diffusion-3.5-medium", "/elsewhere/model", "gone"])
def test_a_model_that_lies_nowhere_there(home: Path, path: str) -> None:
    """A world's name, a hub id, an absolute path, and what the loader will say is not there."""
    assert absolute_places(shapes_run(model={"path": path}), home).model.path == path


@pytest.mark.parametrize(
    ("given", "lies"),
    [
        ("p.txt", "p.txt"),
        ("q.jsonl", "q.jsonl"),
        ("own.py:prompts", "own.py:prompts"),
        ("own.py:WORLD/train", "own.py:WORLD/train"),
        ("shapes/train", None),
        ("hf:owner/set", None),
        ("gone.txt", None),
        ("train", None),
    ],
)
def test_prompts(home: Path, given: str, lies: str | None) -> None:
    config = absolute_places(shapes_run(prompts={"train": given, "held_out": given}), home)
    assert config.prompts.train == config.prompts.held_out == (given if lies is None else str(home / lies))


@pytest.mark.parametrize("rewards", ["own.py:score", {"mine": {"reward": "own.py:score"}}, ["own.py:score", "ocr"]])
def test_a_reward_of_ones_own_keeps_its_label(home: Path, rewards: Any) -> None:
    before = shapes_run(rewards=rewards)
    after = absolute_places(before, home)
    assert list(after.rewards) == list(before.rewards)
    label, term = next(iter(after.rewards.items()))
    assert term.name(label) == f"{home}/own.py:score"
    assert all(after.rewards[each].reward is None for each in after.rewards if each == "ocr")


@pytest.mark.parametrize(
    ("name", "value", "moved"),
    [
        ("weights", "w.pt", True),
        ("weights", "sub/w.safetensors", True),
        ("weights", "weights", True),
        ("question", "question.txt", True),
        ("clip", "models/mine", True),
        ("split", "train", False),
        ("mode", "ocr", False),
        ("model", "Qwen/VL", False),
        ("weights", "openai/clip-vit-large-patch14", False),
        ("url", "http://127.0.0.1:8000/v1", False),
        ("text", "a/b" * 3000, False),
        ("text", "zero\0byte.txt", False),
        ("scale", 3, False),
        ("weights", "", False),
        ("weights", None, False),
    ],
)
def test_options_of_rewards(home: Path, name: str, value: Any, moved: bool) -> None:
    assert value_of(absolute_places(option(name, value), home), name) == (str(home / value) if moved else value)


def test_options_inside_lists_and_tables(home: Path) -> None:
    files = absolute_places(option("files", ["w.pt", "gone.pt"]), home)
    assert value_of(files, "files") == [str(home / "w.pt"), "gone.pt"]
    table = absolute_places(option("judge", {"weights": "w.pt", "model": "Qwen/VL"}), home)
    assert value_of(table, "judge") == {"weights": str(home / "w.pt"), "model": "Qwen/VL"}


def test_what_lies_in_the_runs_folder_is_relative_to_it(home: Path) -> None:
    config = shapes_run(
        model={"path": str(home / "models/mine")},
        prompts={"train": str(home / "p.txt"), "held_out": "/elsewhere/q.txt"},
        rewards={"r": {"reward": f"{home}/own.py:score", "options": {"weights": str(home / "sub/w.safetensors")}}},
    )
    written = places_in(config, home)
    assert written.model.path == "models/mine"
    assert (written.prompts.train, written.prompts.held_out) == ("p.txt", "/elsewhere/q.txt")
    assert written.rewards["r"].reward == "own.py:score"
    assert value_of(written, "weights") == "sub/w.safetensors"
    assert absolute_places(written, home) == config


def test_a_folder_beside_with_a_longer_name_is_not_inside(home: Path) -> None:
    config = shapes_run(prompts={"train": f"{home}-other/p.txt"})
    assert places_in(config, home) == config


@pytest.mark.parametrize(
    ("place", "parts"),
    [("a/own.py:f", ("a/own.py", ":f")), ("C:\\own.py:W/train", ("C:\\own.py", ":W/train")), ("p.txt", ("p.txt", ""))],
)
def test_a_file_and_what_it_defines(place: str, parts: tuple[str, str]) -> None:
    assert file_and_name(place) == parts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://x:1", True),
        (["https://a", "http://b"], True),
        ([], False),
        ("ftp://x", False),
        (["http://a", 3], False),
    ],
)
def test_addresses(value: Any, expected: bool) -> None:
    assert is_url(value) == expected


def test_an_address_is_no_path() -> None:
    assert not may_be_path("weights", "http://x/w.pt")
