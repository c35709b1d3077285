"""`dgpo-bench throughput`: the numbers hang together; how large they are is the machine's matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dgpo_bench import throughput
from dgpo_bench.commands import main
from dgpo_bench.throughput import Throughput
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import SMALL


@pytest.mark.slow
def test_throughput(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    changes = [part for change in SMALL for part in ("--set", change)]
    result = CliRunner().invoke(main, ["throughput", "shapes", *changes, "--iterations", "2", "--output", str(file)])
    assert result.exit_code == 0, result.output
    measured = Throughput.model_validate(json.loads(file.read_text()))
    assert measured.iterations == 2
    assert 0.8 < sum(measured.share.values()) <= 1.001
    # 8 images in 4 steps: one evaluation a step and image.
    assert measured.rollout.median == pytest.approx(measured.images.median * 4)
    # Two timesteps: the frozen base with guidance (2), the policy forward and backward (3).
    assert measured.training.median == pytest.approx(measured.samples.median * 5, rel=0.01)
    for rate in (
        measured.ceiling,
        measured.ceiling_training,
        measured.rollout_of_ceiling,
        measured.training_of_ceiling,
    ):
        assert 0 < rate.low <= rate.median <= rate.high
    assert measured.peak_memory > 2**27
    assert f"{measured.images.median:,.1f} images/s" in result.output


@pytest.mark.fast
def test_the_ceiling_of_kept_graphs_has_no_second_forward() -> None:
    """10 images' forwards are the rollout's; the training phase has their backwards, and 4 of the frozen base's."""
    counted = {"rollout_evaluations": 20.0, "kept_evaluations": 10.0, "differentiated_evaluations": 30.0}
    rate = throughput._bare_training(5.0, 6.0, {**counted, "denoiser_evaluations": 44.0})  # noqa: SLF001
    backward = 3 / 6.0 - 1 / 5.0  # seconds
    assert rate == pytest.approx((2 * 10 + 4) / (10 * backward + 4 / 5.0))


@pytest.mark.slow
def test_the_ceiling_is_timed_on_the_trainers_own_denoiser_before_every_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the peak of memory is read before the first of them, whose passes are not training's."""
    order: list[str] = []
    seen: list[nn.Module] = []
    iterate, ceilings, peak = Trainer.iterations, throughput.bare_rates, throughput.peak_bytes

    def noting_iterations(trainer: Trainer, share_done: Callable[[], float]) -> Iterator[dict[str, float]]:
        for record in iterate(trainer, share_done):
            order.append("iteration")
            yield record

    def noting_ceilings(trainer: Trainer, *rest: Any) -> tuple[float, float]:
        order.append("ceiling")
        velocity = trainer.model.velocity
        layers = [layer for layer in trainer.model.denoiser.modules() if isinstance(layer, BaseTunerLayer)]

        def watched(*inputs: Any) -> torch.Tensor:
            seen.append(trainer.model.denoiser)
            assert layers
            assert all(layer.disable_adapters for layer in layers)
            return velocity(*inputs)

        monkeypatch.setattr(trainer.model, "velocity", watched)
        rates = ceilings(trainer, *rest)
        monkeypatch.setattr(trainer.model, "velocity", velocity)
        return rates

    def noting_peak(on_cpu: bool) -> int:
        order.append("peak")
        return peak(on_cpu)

    monkeypatch.setattr(Trainer, "iterations", noting_iterations)
    monkeypatch.setattr(throughput, "bare_rates", noting_ceilings)
    monkeypatch.setattr(throughput, "peak_bytes", noting_peak)
    throughput.measure("shapes", load_config("shapes", SMALL), 2, lambda text: None)
    assert order == ["iteration", "iteration", "peak", "ceiling", "iteration", "ceiling", "iteration"]
    assert len(set(map(id, seen))) == 1
