"""Runs and GPUs, with devices that are made up: none is needed, and none is touched."""

from __future__ import annotations

import os

import pytest

from dgpo_bench.devices import pin, runs_at_once
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"), [(None, 0, 2), (5, 0, 5), (None, 1, 1), (1, 1, 1), (None, 8, 8), (3, 8, 3)]
)
def test_a_gpu_has_one_run_at_a_time(asked: int | None, gpus: int, expected: int) -> None:
    assert runs_at_once(asked, gpus) == expected


def test_more_runs_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="--jobs 2: there is 1 GPU, and a run needs its own"):
        runs_at_once(2, 1)
    with pytest.raises(UserError, match="--jobs 9: there are 8 GPUs"):
        runs_at_once(9, 8)


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
