"""A run that somebody watches, and ends in the middle of an iteration."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.common.errors import StopNow, Stopped
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.run import resume, train
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import one_reward

pytestmark = pytest.mark.fast


def test_a_run_stopped_inside_an_iteration_goes_on_to_the_same_bits(small_config: RunConfig, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    seen: list[int | None] = []

    def count(trainer: Trainer, record: dict[str, float] | None) -> None:
        seen.append(None if record is None else int(record["iteration"]))

    whole = read_adapter(train(small_config, tmp_path / "whole", console, watch=count)).tensors
    assert seen == [None, 1, 2]
    forwards = 0

    def stop_late(trainer: Trainer, record: dict[str, float] | None) -> None:
        """In the second iteration's third forward."""

        def count_forwards(*_: Any) -> None:
            nonlocal forwards
            forwards += 1
            if forwards == 3:
                raise StopNow

        if record is not None:
            trainer.model.denoiser.register_forward_pre_hook(count_forwards)

    with pytest.raises(Stopped, match="stopped after iteration 1 of 2, all of it saved"):
        train(small_config, tmp_path / "cut", console, watch=stop_late)
    assert forwards == 3
    read_adapter(tmp_path / "cut" / "adapter.safetensors")
    ended = read_adapter(resume(tmp_path / "cut", console)).tensors
    assert all(torch.equal(whole[key], ended[key]) for key in whole)


def test_a_reward_can_end_a_run_too(small_config: RunConfig, tmp_path: Path) -> None:
    """And is not tried again as one that failed would be."""
    calls = 0

    def reward(images: torch.Tensor, prompts: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the base's evaluation, the first iteration, the second
            raise StopNow
        return images.mean((1, 2, 3))

    with pytest.raises(Stopped, match="stopped after iteration 1 of 2"):
        train(small_config, tmp_path / "run", Console(file=io.StringIO()), rewards=one_reward(reward))
    assert calls == 3
    assert (tmp_path / "run" / "adapter.safetensors").exists()
