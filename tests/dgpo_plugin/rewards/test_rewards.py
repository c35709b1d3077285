"""Rewards: users' own, sums, and pictures scored from disk."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import files_hash, import_from_file, loaded_hash
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.config.load import load_config, reward_terms
from dgpo_plugin.rewards import REWARDS, load_reward, load_rewards
from dgpo_plugin.rewards.image_statistics import STATISTICS, diversity
from dgpo_plugin.training import run
from dgpo_plugin.training.checkpoint import checkpoints, load_checkpoint
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import SMALL, shapes_run

pytestmark = pytest.mark.fast


# ---- users' own, sums

OWN = """
import torch

def brightness(images, prompts):
    return images.mean((1, 2, 3))

class Longest:
    def __call__(self, images, prompts):
        return torch.tensor([float(len(p.text)) for p in prompts])

number = 3

def one(images):
    return images
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


PICTURES, PROMPTS = torch.full((2, 3, 8, 8), 0.25), [Prompt("ab"), Prompt("abcd")]


def test_a_users_own_function_or_class(own: Path) -> None:
    assert load_reward(f"{own}:brightness")(PICTURES, PROMPTS).tolist() == [0.25, 0.25]
    assert load_reward(f"{own}:Longest")(PICTURES, PROMPTS).tolist() == [2, 4]


def test_a_weighted_sum(own: Path) -> None:
    config = shapes_run(rewards={f"{own}:brightness": 2, f"{own}:Longest": -0.5})
    loaded = load_rewards(config.rewards)
    assert loaded.total(loaded.score(PICTURES, PROMPTS)).tolist() == [-0.5, -1.5]
    assert loaded.title == config.reward_label
    assert config.reward_label.startswith("2 ")
    assert loaded.sha256 == hashlib.sha256(OWN.encode() * 2).hexdigest()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:x", "no file missing.py"),
        ("{own}:absent", "defines no 'absent'"),
        ("{own}:number", "number: cannot be called"),
        ("{own}:one", r"must take \(images, prompts\)"),
        ("ocrr", "no reward 'ocrr'; did you mean 'ocr'"),
    ],
)
def test_rewards_that_cannot_be_loaded(own: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(name.format(own=own))


def test_an_error_in_a_users_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match="ModuleNotFoundError while loading it: No module named 'nowhere_to_be_found'"):
        load_reward(f"{tmp_path / 'broken.py'}:x")


def test_a_file_that_ends_the_program_is_an_error_and_no_success(tmp_path: Path) -> None:
    """`sys.exit(0)` at its top once ended `dgpo train` with exit code 0, nothing trained."""
    file = tmp_path / "leaves.py"
    file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="SystemExit while loading it"):
        load_reward(f"{file}:reward")


def test_a_reward_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dgpo_plugin.common.registry.find_spec", lambda name: None if name == "rapidocr" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"reward ocr: needs rapidocr; pip install 'dgpo-plugin\[rewards\]'"):
        load_reward("ocr")
    listed = CliRunner().invoke(main, ["list", "rewards"]).output
    assert "Apache-2.0, its README's); needs rapidocr; pip install" in listed
    assert "ocr\n    the words in quotes (or metadata text) as read back\n    [0, 1]; weights: PP-OCRv6" in listed
    assert "986 M parameters; installed" in listed


def test_a_run_is_not_resumed_with_another_reward_file(own: Path, tmp_path: Path) -> None:
    config = load_config("shapes", [*SMALL, f"rewards={own}:brightness", "training.decay=none"])
    adapter = run.train(config, tmp_path / "run", Console(quiet=True))
    own.write_text(OWN.replace("images.mean", "-images.mean"))
    with pytest.raises(UserError, match="the reward's file is not the one"):
        run.resume(adapter.parent, Console(quiet=True))


def test_a_reward_edited_during_the_run_is_not_taken_for_the_one_it_began_with(own: Path, tmp_path: Path) -> None:
    """The checkpoints saved after the edit are still of the reward that was loaded, and so are those after a resume."""
    overrides = [f"rewards={own}:brightness", "training.decay=none", "checkpoint.every=1", "checkpoint.keep=9"]
    config = load_config("shapes", [*SMALL, *overrides])
    edited = OWN.replace("images.mean", "-images.mean")

    def edit(trainer: Trainer, record: dict[str, float] | None) -> None:
        own.write_text(edited)

    folder = run.train(config, tmp_path / "run", Console(quiet=True), watch=edit).parent
    with pytest.raises(UserError, match="the reward's file is not the one"):
        run.resume(folder, Console(quiet=True), iterations=3)
    own.write_text(OWN)
    run.resume(folder, Console(quiet=True), iterations=3, watch=edit)
    hashes = {load_checkpoint(path).identity.rewards_sha256 for path in checkpoints(folder)}
    assert hashes == {hashlib.sha256(OWN.encode()).hexdigest()}


def test_a_file_with_the_size_and_time_of_the_one_before_is_read_anew(own: Path) -> None:
    """Python's cache of translations would take it for that one, and the hash would be of what did not run."""
    name, picture = f"{own}:brightness", torch.ones(1, 3, 4, 4)
    before = own.stat()
    first = import_from_file(name, "reward")(picture, [])
    hashed = loaded_hash([name])
    own.write_text(OWN.replace("images.mean((1, 2, 3))", "images.mean((1,2,3))*2"))
    assert own.stat().st_size == before.st_size
    os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert loaded_hash([name]) == hashed != files_hash([name])
    assert import_from_file(name, "reward")(picture, []).tolist() == [2.0] != first.tolist()
    assert loaded_hash([name]) == files_hash([name])


@pytest.mark.parametrize("aggregate", ["rewards", "advantages"])
def test_several_rewards_are_logged_one_by_one_and_a_constant_one_is_named(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], aggregate: str
) -> None:
    first, second = f"{own}:brightness", f"{own}:Longest"  # the second is the same for all images of a prompt
    overrides = [f"rewards={{{first}: 2, {second}: 1}}", f"scoring.aggregate={aggregate}"]
    adapter = run.train(load_config("shapes", [*SMALL, *overrides]), tmp_path / "run", Console(width=400))
    records = [json.loads(line) for line in (adapter.parent / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record["reward"] == pytest.approx(2 * record[f"reward/{first}"] + record[f"reward/{second}"], rel=1e-5)
        assert (record[f"constant_groups/{first}"], record[f"constant_groups/{second}"]) == (0, 1)
        assert record["grad_norm"] > 0
    said = f"reward {second}: the same for all images of each of the 2 prompt groups"
    assert capsys.readouterr().out.count(said) == len(records)


def test_options_reach_a_users_class_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scaled.py").write_text(
        "class Scaled:\n"
        "    def __init__(self, config, factor=1.0):\n        self.factor, self.config = factor, config\n"
        "    def __call__(self, images, prompts):\n        return self.factor * images.mean((1, 2, 3))\n"
    )
    name = f"{tmp_path / 'scaled.py'}:Scaled"
    loaded = load_reward(name, RewardTerm(options={"factor": 8}, batch_size=5))
    assert loaded(PICTURES, PROMPTS).tolist() == [2, 2]
    assert loaded.function.config.batch_size == 5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="has no option 'facto'; did you mean 'factor'"):
        load_reward(name, RewardTerm(options={"facto": 8}))
    with pytest.raises(UserError, match="shapes: has no option 'x', nor any other"):
        load_reward("shapes", RewardTerm(options={"x": 8}))


def test_settings_of_one_reward_among_several() -> None:
    terms, scoring = reward_terms(["hpsv2.1", "ocr"], ["device=cpu", "rewards.hpsv2.1.options.weights=/x.pt"])
    assert scoring == ScoringConfig(device="cpu")
    assert terms == {"hpsv2.1": RewardTerm(options={"weights": "/x.pt"}), "ocr": RewardTerm()}
    with pytest.raises(UserError, match=r"of which reward\? write rewards.hpsv2.1.options.weights=/x.pt"):
        reward_terms(["hpsv2.1", "ocr"], ["options.weights=/x.pt"])
    assert reward_terms(["ocr"], ["options={a: 1}", "options.b=2"])[0]["ocr"].options == {"a": 1, "b": 2}


# ---- cheap statistics


def test_statistics_in_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = torch.full((3, 32, 32), 0.5)
    noise = torch.rand(3, 32, 32, generator=generator)
    halves = blank.clone()
    halves[:, :, :16] = 1
    blurred = (noise + noise.roll(1, 1) + noise.roll(1, 2) + noise.roll((1, 1), (1, 2))) / 4
    images = torch.stack([blank, noise, halves, blurred])
    found = {name: load_reward(name)(images, [Prompt("")] * 4).tolist() for name in STATISTICS}
    assert found["brightness"] == pytest.approx([0.5, noise.mean().item(), 0.75, noise.mean().item()], abs=1e-6)
    assert found["color-entropy"][0] == 0
    assert found["color-entropy"][2] == pytest.approx(1)  # two colours, half each
    assert found["sharpness"][0] == 0
    assert found["sharpness"][3] < 0.6 * found["sharpness"][1]
    assert found["jpeg-size"][0] < found["jpeg-size"][2] < found["jpeg-size"][3] < found["jpeg-size"][1]
    file = io.BytesIO()
    Image.fromarray((noise * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
    assert found["jpeg-size"][1] == pytest.approx(len(file.getvalue()) / 1000)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    first, second = torch.zeros(3, 8, 8).numpy(), torch.full((3, 8, 8), 0.5).numpy()
    assert diversity(np.stack([[first, first]])) == pytest.approx(0, abs=1e-6)
    assert diversity(np.stack([[first, second], [first, first]])) == pytest.approx(0.25)


# ---- dgpo score


def test_pictures_are_scored_from_a_folder(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, level in (("b.png", 255), ("a.png", 0)):
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / name)
    asked = ["score", str(folder), "--reward", f"{own}:brightness,{own}:Longest", "--prompt", "abc"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png"]
    assert [float(row[f"{own}:brightness"]) for row in rows] == [0, 1]
    assert [float(row[f"{own}:Longest"]) for row in rows] == [3, 3]
    out = tmp_path / "scores.json"
    (tmp_path / "prompts.txt").write_text("one\nthree\n")
    asked = ["score", str(folder), "--reward", f"{own}:Longest", "--prompts", str(tmp_path / "prompts.txt")]
    assert CliRunner().invoke(main, [*asked, "--output", str(out)]).exit_code == 0
    assert [row[f"{own}:Longest"] for row in json.loads(out.read_text())] == [3, 5]


def test_pictures_of_several_sizes_are_scored_in_batches(tmp_path: Path) -> None:
    counting = tmp_path / "counting.py"
    counting.write_text(
        "calls = []\n"
        "def size(images, prompts):\n"
        "    calls.append(len(images))\n"
        "    return images.shape[3] + 0 * images.mean((1, 2, 3)) + len(calls) / 100\n"
    )
    for name, width in zip("abcdefg", (8, 8, 8, 16, 16, 8, 8), strict=True):
        Image.new("RGB", (width, 8)).save(tmp_path / f"{name}.png")
    asked = ["score", str(tmp_path), "--reward", f"{counting}:size", "--prompt", "x", "--set", "batch_size=4"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    values = [float(row[f"{counting}:size"]) for row in csv.DictReader(io.StringIO(result.stdout))]
    # a b c | d, then e | f g: sizes never mix, and four are in memory at most.
    assert values == pytest.approx([8.01, 8.01, 8.01, 16.02, 16.03, 8.04, 8.04], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_sise=4", "unknown key batch_sise; did you mean 'batch_size'?"),
        ("precision=fp8", "precision"),
        ("rewards.brightnes.offload=true", "--set: brightnes is not among the rewards; did you mean 'brightness'?"),
        ("options.shapse=1", "reward brightness: has no option 'shapse', nor any other"),
    ],
)
def test_settings_that_score_does_not_have(tmp_path: Path, override: str, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = ["score", str(tmp_path), "--reward", "brightness", "--prompt", "x", "--set", override]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "a"], "nowhere: no such file"),
        (["{folder}", "--prompt", "a"], "holds no picture"),
        (["{folder}/x.png", "--prompt", "a"], "not a picture that can be read"),
        (["{folder}/x.png"], "--prompt, --prompts: give one of the two"),
        (["{folder}/x.png", "--prompts", "ocr/test"], "200 prompts for 1 pictures"),
    ],
)
def test_what_cannot_be_scored(own: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if "x.png" in arguments[0]:
        (folder / "x.png").write_bytes(b"no picture")
    given_arguments = [part.format(folder=folder) for part in arguments]
    result = CliRunner().invoke(main, ["score", *given_arguments, "--reward", f"{own}:brightness"])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("name", [name for name, entry in REWARDS.entries().items() if entry.weights != "none"])
def test_a_license_comes_with_whose_word_it_is(name: str) -> None:
    """Each part of it: a card's, a README's, a repository's, the weights' own, or nobody's that was seen."""
    for part in REWARDS.get(name).license.split(";"):
        assert any(word in part for word in ("card", "README", "repository", "weights' own", "not verified")), part
