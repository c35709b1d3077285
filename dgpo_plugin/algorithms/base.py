"""What the trainer asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgpo_plugin.advantages import AdvantageStd
from dgpo_plugin.config import DGPOConfig, FlowGRPOConfig, FlowGRPOFastConfig, RunConfig
from dgpo_plugin.lora import Policy
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.rollout import Rollout
from dgpo_plugin.seeding import derive_seed, seeded_noise

Metrics = dict[str, float]
Backward = Callable[[Tensor], None]
"""Differentiates a loss; accelerate's, so that it may scale it."""


@dataclass(frozen=True)
class Draw:
    """Where the randomness of one iteration comes from (DESIGN section 5.1)."""

    seed: int
    iteration: int

    def noise(self, shape: Sequence[int], *purpose: int | str) -> Tensor:
        return seeded_noise(shape, self.seed, self.iteration, *purpose)

    def initial_noise(self, shape: Sequence[int], slots: Sequence[int], group_size: int) -> Tensor:
        """(P * G, ...): one draw for each image of each prompt group."""
        return torch.stack([self.noise(shape, "initial noise", p, g) for p in slots for g in range(group_size)])

    def step_noise(self, shape: Sequence[int], slots: Sequence[int], group_size: int, step: int) -> Tensor:
        """(P * G, ...): the fresh noise of one stochastic sampler step."""
        return torch.stack([self.noise(shape, "step noise", step, p, g) for p in slots for g in range(group_size)])

    def choose(self, count: int, among: int, *purpose: int | str) -> list[int]:
        """``count`` of ``range(among)`` without replacement, in rising order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.iteration, *purpose))
        return sorted(torch.randperm(among, generator=generator)[:count].tolist())


class Algorithm(Protocol):
    """How to sample, and how to turn advantages into gradients. State lives in the algorithm's own copies."""

    advantage_std: AdvantageStd

    def sample(
        self, policy: Policy, conditioning: Conditioning, slots: list[int], group_size: int, draw: Draw
    ) -> Rollout:
        """G images for each prompt (P rows of ``conditioning``), without gradient."""

    def accumulate_gradient(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, draw: Draw, backward: Backward
    ) -> Metrics:
        """Add one optimizer step's gradient for advantages (P, G); returns what to log."""

    def after_step(self, policy: Policy, step: int) -> None:
        """Called after optimizer step ``step`` (from 0)."""


def make_algorithm(config: RunConfig, policy: Policy) -> Algorithm:
    """The algorithm that the configuration names."""
    from dgpo_plugin.algorithms.dgpo import DGPO
    from dgpo_plugin.algorithms.flow_grpo import FlowGRPO

    size = config.training.micro_batch_size
    algorithm = config.algorithm
    if isinstance(algorithm, DGPOConfig):
        return DGPO(algorithm, config.rollout, policy, size)
    assert isinstance(algorithm, FlowGRPOConfig | FlowGRPOFastConfig)
    return FlowGRPO(algorithm, config.rollout, size)
