"""Runs and GPUs, with devices that are made up: none is needed, and none is touched."""

from __future__ import annotations

import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

from dgpo_bench import devices, workers
from dgpo_bench.devices import pin, runs_at_once
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"), [(None, 0, 2), (5, 0, 5), (None, 1, 1), (1, 1, 1), (None, 8, 8), (3, 8, 3)]
)
def test_a_gpu_has_one_run_at_a_time(asked: int | None, gpus: int, expected: int) -> None:
    assert runs_at_once(asked, gpus) == expected


@pytest.mark.parametrize(
    ("asked", "gpus", "processes", "expected"),
    [(None, 8, 4, 2), (None, 8, 3, 2), (1, 8, 8, 1), (None, 0, 2, 1), (2, 0, 2, 2)],
)
def test_a_run_of_several_processes_has_as_many_gpus(
    asked: int | None, gpus: int, processes: int, expected: int
) -> None:
    assert runs_at_once(asked, gpus, processes) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="^--processes 9: there are 8 GPUs, and a process needs its own$"):
        runs_at_once(None, 8, 9)
    with pytest.raises(UserError, match="^--jobs 3: there are 8 GPUs, and a run needs 4 of its own$"):
        runs_at_once(3, 8, 4)


def test_more_runs_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="--jobs 2: there is 1 GPU, and a run needs its own"):
        runs_at_once(2, 1)
    with pytest.raises(UserError, match="--jobs 9: there are 8 GPUs"):
        runs_at_once(9, 8)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0,1,2,3", "4,5,6,7"]), ("7,6,5,4,3,2,1,0", ["7,6,5,4", "3,2,1,0"])]
)
def test_two_runs_of_four_processes_see_half_of_the_gpus_each(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker, seen in enumerate(expected):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        pin(worker, 4)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])],
)
def test_each_worker_sees_its_own_gpu_alone(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for worker in range(2):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        pin(worker)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == expected


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_imported_ahead_where_there_may_be_gpus(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has looked for GPUs must not be forked."""
    if there:
        (tmp_path / "driver").touch()
    monkeypatch.setattr(devices, "GPU_FILES", (str(tmp_path / "none"), str(tmp_path / "driver")))
    monkeypatch.setattr(devices.sys, "platform", "linux")
    started: list[bool] = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: started.append(True))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    with workers.importing_ahead():
        assert bool(started) is not there


def test_other_systems_may_have_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GPU_FILES", ())
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    assert devices.may_have_gpus()


def test_a_machine_without_gpus_has_none_to_count() -> None:
    assert devices.may_have_gpus() or devices.gpu_count() == 0
