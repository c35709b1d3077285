"""Trailing copies of the adapter: the moving average, and the old policy's schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dgpo_plugin.algorithms.dgpo import DGPO
from dgpo_plugin.config import DGPOConfig, RolloutConfig
from dgpo_plugin.lora import move_towards

pytestmark = pytest.mark.fast

SHAPES = [(3, 4), (5,)]


class FakePolicy:
    """What ``DGPO.after_step`` needs of a policy, without a model."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(tensor) for tensor in tensors(seed=0)]

    def copy_weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_move_towards_keeps_decay_of_the_copy(decay: float) -> None:
    copy, parameters = tensors(seed=1), [nn.Parameter(tensor) for tensor in tensors(seed=2)]
    expected = [decay * c + (1 - decay) * p.detach() for c, p in zip(copy, parameters, strict=True)]
    places = [tensor.data_ptr() for tensor in copy]
    move_towards(copy, parameters, decay)
    close(copy, expected)
    assert [tensor.data_ptr() for tensor in copy] == places  # in place
    assert not any(tensor.requires_grad for tensor in copy)
    close([parameter.detach() for parameter in parameters], tensors(seed=2))  # the parameters stay


def test_move_towards_in_float32() -> None:
    copy, parameters = [torch.full((4,), 2.0)], [torch.full((4,), 1.0)]
    for _ in range(50):
        move_towards(copy, parameters, 0.9)
    assert copy[0].dtype == torch.float32
    torch.testing.assert_close(copy[0], torch.full((4,), 1 + 0.9**50), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("step", "keep"), [(0, 0.0), (1, 0.001), (100, 0.1), (299, 0.299), (300, 0.3), (301, 0.3), (5000, 0.3)]
)
def test_the_old_policy_trails_by_the_schedule(step: int, keep: float) -> None:
    policy = FakePolicy()
    algorithm = DGPO(DGPOConfig(), RolloutConfig(), policy, None)  # type: ignore[arg-type]
    before = [tensor.clone() for tensor in algorithm.old_weights]
    moved_to = tensors(seed=3)
    for parameter, value in zip(policy.parameters, moved_to, strict=True):
        parameter.data.copy_(value)
    algorithm.after_step(policy, step)  # type: ignore[arg-type]
    close(algorithm.old_weights, [keep * b + (1 - keep) * p for b, p in zip(before, moved_to, strict=True)])
    close([parameter.detach() for parameter in policy.parameters], moved_to)


def test_the_old_policy_over_many_steps() -> None:
    policy = FakePolicy()
    algorithm = DGPO(DGPOConfig(), RolloutConfig(), policy, None)  # type: ignore[arg-type]
    expected = policy.copy_weights()
    for step in range(400):
        for parameter in policy.parameters:
            parameter.data.add_(0.01 * (step % 7 - 2))
        algorithm.after_step(policy, step)  # type: ignore[arg-type]
        mu = step / 1000 if step < 300 else 0.3
        expected = [mu * old + (1 - mu) * p.detach() for old, p in zip(expected, policy.parameters, strict=True)]
    close(algorithm.old_weights, expected)
