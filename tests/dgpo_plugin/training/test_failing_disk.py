"""A disk that fails at any one operation of a run, or a folder that is taken away: one line, and no bit is lost."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from dgpo_plugin.common.errors import Stopped, UserError
from dgpo_plugin.common.folder_lock import LOCK
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.run_folder import RunFolder
from dgpo_plugin.training.trainer import Trainer
from tests.chaos.disk import Disk, Fault
from tests.conftest import one_reward
from tests.dgpo_plugin.training.test_short_runs import tiny

QUIET = Console(quiet=True)
CONFIG = (
    "training.iterations=2",
    "checkpoint.every=1",
    "checkpoint.keep=1",
    "logging.sample_every=2",
    "logging.sample_images=1",
)


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    """Every operation of this process on a folder; an audit hook stays as long as its process."""
    disk = Disk()
    sys.addaudithook(disk.hook)
    yield disk
    disk.watch(None)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The adapter of a run whose disk is well; it and all later runs share one trainer, put back to its start."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    made: list[tuple[Trainer, dict[str, dict[str, Tensor]]]] = []

    def shared(config: RunConfig, *, rewards: RewardSet, failures: Path) -> Trainer:
        if not made:
            trainer = build_trainer(config, rewards=rewards, failures=failures)
            state = trainer.state()
            made.append((trainer, {copy: {n: t.clone() for n, t in state[copy].items()} for copy in state}))
        trainer, beginning = made[0]
        trainer.optimizer.state.clear()
        trainer.restore(beginning, 0, 0)
        return trainer

    monkeypatch.setattr(run, "build_trainer", shared)
    return begin(tmp_path / "whole" / "run").read_bytes()


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.mean((1, 2, 3))


def begin(folder: Path, **more: Any) -> Path:
    return run.train(tiny(*CONFIG), folder, QUIET, rewards=one_reward(brightness), **more)


def go_on(folder: Path) -> Path:
    if not (folder / "config.yaml").exists():
        return begin(folder)
    return run.resume(folder, QUIET, rewards=one_reward(brightness))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.slow
def test_each_operation_of_a_run_may_be_the_one_that_fills_the_disk(whole: bytes, disk: Disk, tmp_path: Path) -> None:
    """Read-only and broken disks are in tests/chaos."""
    at, ended_well = 0, False
    while not ended_well:
        at += 1
        folder = tmp_path / str(at) / "run"
        folder.parent.mkdir()
        disk.watch(folder, Fault(at, errno.ENOSPC, stays=True))
        said = ""
        try:
            begin(folder)
            ended_well = disk.count < at
        except UserError as error:
            said = str(error)
        disk.watch(None)
        assert len(said.splitlines()) <= 1
        assert not said or os.strerror(errno.ENOSPC) in said, at
        assert go_on(folder).read_bytes() == whole, at
        assert hidden(folder) == [LOCK], at
        shutil.rmtree(folder.parent)
    assert at > 20


@pytest.mark.fast
@pytest.mark.parametrize("how", ["removed", "moved", "made anew"])
def test_a_folder_that_is_taken_away_is_one_line_and_not_made_again(how: str, whole: bytes, tmp_path: Path) -> None:
    folder, away = tmp_path / "here" / "run", tmp_path / "here" / "away"

    def take_away(trainer: Trainer, record: dict[str, float] | None) -> None:
        if trainer.iteration == 1 and record is not None:
            folder.rename(away)
            if how == "removed":
                shutil.rmtree(away)
            if how == "made anew":
                begin(folder)

    with pytest.raises(UserError) as refused:
        begin(folder, watch=take_away)
    (line,) = str(refused.value).splitlines()
    if how == "made anew":
        assert "was made anew by another process" in line or "was removed or moved" in line
        assert (folder / "adapter.safetensors").read_bytes() == whole
        return
    assert line.startswith(f"{folder}: was removed or moved while it was being written")
    assert not folder.exists()
    if how == "moved":
        away.rename(folder)
        assert go_on(folder).read_bytes() == whole


@pytest.mark.fast
def test_a_log_that_cannot_be_written_saves_what_was_done(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder.log

    def full(folder: RunFolder, record: dict[str, float]) -> None:
        if record["iteration"] == 1:
            raise UserError("cannot write metrics.jsonl: No space left on device; choose a writable folder")
        original(folder, record)

    monkeypatch.setattr(RunFolder, "log", full)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="metrics.jsonl: No space left"):
        begin(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000001"]


@pytest.mark.fast
def test_what_a_tracker_says_at_the_end_does_not_hide_why_the_run_stopped(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(trainer: Trainer, record: dict[str, float] | None) -> None:
        vars(trainer.accelerator)["end_training"] = fail
        if record is not None:
            raise UserError("the reason")

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="^the reason$"):
        begin(tmp_path / "a" / "run", watch=stop)

    def only_at_the_end(trainer: Trainer, record: dict[str, float] | None) -> None:
        vars(trainer.accelerator)["end_training"] = fail

    with pytest.raises(UserError, match=r"^logging.trackers: cannot write: No space left on device; make room"):
        begin(tmp_path / "b" / "run", watch=only_at_the_end)
    assert (tmp_path / "b" / "run" / "adapter.safetensors").read_bytes() == whole


@pytest.mark.fast
def test_what_killed_processes_left_half_written_is_gone_when_a_run_goes_on(whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def stop(trainer: Trainer, record: dict[str, float] | None) -> None:
        if trainer.iteration == 1:
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        begin(folder, watch=stop)
    for name in ("checkpoints/.000002.tmp/x", "checkpoints/.000000.gone/x"):
        (folder / name).mkdir(parents=True)
    for name in (".config.yaml.77.tmp.yaml", "samples/.000002.png.77.tmp.png", "failed-reward/.0.png.7.tmp.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "checkpoints" / ".nfs0001").touch()  # a file system's own, which is none of ours
    try:
        assert go_on(folder).read_bytes() == whole
    except Stopped:
        pytest.fail("it was told to stop")
    assert sorted(hidden(folder)) == [LOCK, ".nfs0001"]


@pytest.mark.fast
def test_pictures_that_the_disk_did_not_take_are_drawn_when_a_run_goes_on(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder.write_samples

    def full(folder: RunFolder, iteration: int, pictures: Tensor) -> None:
        if iteration == 2:
            raise UserError("cannot write 000002.png: No space left on device; choose a writable folder")
        original(folder, iteration, pictures)

    monkeypatch.setattr(RunFolder, "write_samples", full)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"000002.png: No space left"):
        begin(folder)
    monkeypatch.setattr(RunFolder, "write_samples", original)
    assert go_on(folder).read_bytes() == whole
    pictures = [(where / "samples" / "000002.png").read_bytes() for where in (folder, tmp_path / "whole" / "run")]
    assert pictures[0] == pictures[1]
