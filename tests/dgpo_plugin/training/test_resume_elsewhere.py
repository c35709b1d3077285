"""A run that goes on in another place: with what it was started with, wherever that lies, and with nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.load import settled_model, world_pipeline
from dgpo_plugin.training import build, run
from dgpo_plugin.training.run_folder import RunFolder
from tests.conftest import SMALL

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
REWARD = """
from pathlib import Path

class Redness:
    def __init__(self, weights):
        self.factor = float(Path(weights).read_text())

    def __call__(self, images, prompts):
        return self.factor * images[:, 0].mean((1, 2))
"""
PLACES = {
    "model.path": "base",
    "prompts.train": "prompts.txt",
    "prompts.held_out": "held-out.txt",
    "rewards.mine.reward": "own.py:Redness",
    "rewards.mine.options.weights": "factor.txt",
}
"""Settings and what they name, all in one folder."""


def things(folder: Path) -> Path:
    """The folder with everything that the run names."""
    shutil.copytree(world_pipeline("shapes"), folder / "base")
    (folder / "own.py").write_text(REWARD)
    (folder / "factor.txt").write_text("2.0")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    (folder / "held-out.txt").write_text("a yellow circle\na red square\n")
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations with relative paths, in a folder whose own working directory it was started in."""
    home = things(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        given = [f"{key}={value}" for key, value in PLACES.items() if not key.startswith("rewards.")]
        reward = json.dumps({"mine": {"reward": "own.py:Redness", "options": {"weights": "factor.txt"}}})
        changes = [*SMALL, *given, f"rewards={reward}", "training.decay=none", "checkpoint.every=1"]
        changes += ["evaluation.images=2", "logging.sample_images=2", "training.iterations=2"]
        run.train(load_config("shapes", changes), Path("run"), QUIET)
    return home


@pytest.fixture
def moved(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything moved elsewhere, and another working directory; what was there is gone."""
    home = tmp_path / "moved"
    shutil.copytree(started, home)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = (home / "run" / "config.yaml").read_text()
    (home / "run" / "config.yaml").write_text(text.replace(str(started), str(tmp_path / "gone")))
    return home


def sets(home: Path, *keys: str) -> list[str]:
    return [f"{key}={home / PLACES[key]}" for key in keys or PLACES]


def written(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return values


def test_paths_are_absolute_when_the_run_starts(started: Path) -> None:
    config = written(started / "run")
    assert config["model"]["path"] == str(started / "base")
    assert config["prompts"] == {"train": str(started / "prompts.txt"), "held_out": str(started / "held-out.txt")}
    assert config["rewards"]["mine"]["reward"] == f"{started}/own.py:Redness"
    assert config["rewards"]["mine"]["options"] == {"weights": str(started / "factor.txt")}


def test_another_working_directory(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(started / "run", tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    before = (folder / "config.yaml").read_text()
    run.resume(Path("run"), QUIET)
    assert (folder / "config.yaml").read_text() == before


def test_everything_was_moved_and_is_found_again(moved: Path, started: Path) -> None:
    """The same bits as a run that was never moved; and what was said once need not be said again."""
    with pytest.raises(UserError, match="gone"):
        run.resume(moved / "run", QUIET)
    result = CliRunner().invoke(
        main, ["resume", str(moved / "run"), "--iterations", "3", *(f"--set={text}" for text in sets(moved))]
    )
    assert result.exit_code == 0, result.output
    assert written(moved / "run")["model"]["path"] == str(moved / "base")
    run.resume(moved / "run", QUIET)
    stayed = Path(shutil.copytree(started / "run", moved / "stayed"))
    run.resume(stayed, QUIET, iterations=3)
    first, second = (load_file(folder / "checkpoints/000003/state.safetensors") for folder in (moved / "run", stayed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_relative_path_of_set_is_the_working_directorys(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(moved)
    run.resume(Path("run"), QUIET, overrides=[f"{key}={value}" for key, value in PLACES.items()])
    assert written(moved / "run")["prompts"]["train"] == str(moved / "prompts.txt")


def test_files_inside_the_runs_folder_move_with_it(moved: Path) -> None:
    folder = moved / "run"
    shutil.copy(moved / "prompts.txt", folder / "prompts.txt")
    changes = [*sets(moved), f"prompts.train={folder / 'prompts.txt'}"]
    run.resume(folder, QUIET, overrides=changes)
    assert written(folder)["prompts"]["train"] == "prompts.txt"
    folder.rename(moved / "renamed")
    run.resume(moved / "renamed", QUIET)
    assert RunFolder(moved / "renamed").read_config().prompts.train == str(moved / "renamed" / "prompts.txt")


def other_numbers(file: Path) -> None:
    save_file({name: (t * 1.1).contiguous() for name, t in load_file(file).items()}, file, {"format": "pt"})


def other_shift(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 1.0}))


def test_what_is_not_there_any_more_is_named_with_the_cure(moved: Path) -> None:
    with pytest.raises(UserError) as refused:
        run.resume(
            moved / "run", QUIET, overrides=[s for s in sets(moved) if not s.startswith(("model", "prompts.train"))]
        )
    said = str(refused.value)
    assert re.match(
        r"model.path: nothing is at \S*/base any more; prompts.train: nothing is at \S*/prompts.txt any", said
    )
    assert said.endswith(f"dgpo resume {moved / 'run'} --set model.path=... --set prompts.train=...")


def test_what_was_replaced_is_refused_part_by_part(moved: Path) -> None:
    before = (moved / "run" / "config.yaml").read_text()
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        other_numbers(moved / "base" / f"{part}.safetensors")
    other_shift(moved / "base")
    (moved / "prompts.txt").write_text("a red circle\na blue square\na yellow circle\n")
    (moved / "held-out.txt").write_text("a yellow circle\n" * 2)
    (moved / "factor.txt").write_text("3.0")
    (moved / "own.py").write_text(REWARD.replace("images[:, 0]", "images[:, 1]"))
    with pytest.raises(UserError) as refused:
        run.resume(moved / "run", QUIET, overrides=sets(moved))
    for said in (
        "the base's scheduler is not the one",
        "(shift is 1.0 and was 3.0)",
        "the base's text_encoder is not the one",
        "the base's vae is not the one",
        "the prompts are not those",
        "the held-out prompts are not those",
        "the reward's file is not the one",
        "rewards.mine.options.weights does not lead to the content",
        "say where the base is now: dgpo resume",
    ):
        assert said in str(refused.value)
    assert "transformer" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (moved / "run" / "config.yaml").read_text() == before


def test_a_rounded_base_is_refused_as_such(moved: Path) -> None:
    file = moved / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="the base's transformer is the same but rounded: .* stored in another type"):
        run.resume(moved / "run", QUIET, overrides=sets(moved))


def test_where_a_reward_runs_is_free(started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(started / "run", tmp_path / "run"))
    run.resume(folder, Console(width=300), overrides=["scoring.batch_size=3", "rewards.mine.offload=true"])
    said = capsys.readouterr().out
    assert "reward mine: batch_size is 3 and was 16; last bits may differ" in said
    assert written(folder)["scoring"]["batch_size"] == 3


def test_set_may_not_change_what_the_result_depends_on(started: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(started / "run", tmp_path / "run"))
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="training.seed is 7, but .* was trained with 0"):
        run.resume(folder, QUIET, overrides=["training.seed=7"])
    with pytest.raises(UserError, match="unknown key training.sede; did you mean 'seed'"):
        run.resume(folder, QUIET, overrides=["training.sede=7"])
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize("how", ["edited", "set"])
def test_auto_stays_what_it_was_found_to_be(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """On a machine where it would now be bf16."""
    folder = Path(shutil.copytree(started / "run", tmp_path / "run"))
    text = (folder / "config.yaml").read_text()
    if how == "edited":
        assert "\n  precision: fp32" in text
        (folder / "config.yaml").write_text(text.replace("\n  precision: fp32", "\n  precision: auto", 1))
    really = settled_model

    def elsewhere(config: Any, *others: Any) -> Any:
        assert config.precision == "fp32"
        return really(config, *others)

    monkeypatch.setattr(build, "settled_model", elsewhere)
    run.resume(folder, QUIET, overrides=[] if how == "edited" else ["model.precision=auto"])
    assert written(folder)["model"]["precision"] == "fp32"
