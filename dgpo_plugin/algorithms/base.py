"""What the trainer asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.common.seeding import derive_seed, seeded_noise
from dgpo_plugin.config.fields import (
    AdvantageStd,
    DGPOConfig,
    FlowGRPOConfig,
    FlowGRPOFastConfig,
    RolloutConfig,
    RunConfig,
    Schedule,
)
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy

Metrics = dict[str, float]
Backward = Callable[[Tensor], None]
"""Differentiates a loss; accelerate's, so that it may scale it."""


@dataclass(frozen=True)
class Draw:
    """Where the randomness of one iteration comes from (docs/architecture.md, section 5)."""

    seed: int
    iteration: int

    def noise(self, shape: Sequence[int], *purpose: int | str) -> Tensor:
        return seeded_noise(shape, self.seed, self.iteration, *purpose)

    def image_noise(self, shape: Sequence[int], images: Tensor, group_size: int, *purpose: int | str) -> Tensor:
        """(N, ...): one draw for each of the iteration's images n = p * G + g."""
        return torch.stack([self.noise(shape, *purpose, *divmod(n, group_size)) for n in images.tolist()])

    def group_noise(self, shape: Sequence[int], images: Tensor, group_size: int, *purpose: int | str) -> Tensor:
        """(N, ...): one draw for each prompt group, the same for all its images."""
        groups = [n // group_size for n in images.tolist()]
        drawn = {group: self.noise(shape, *purpose, group) for group in sorted(set(groups))}
        # A process may have no image of a small part of the iteration.
        return torch.stack([drawn[group] for group in groups]) if groups else torch.zeros(0, *shape)

    def choose(self, count: int, among: int, *purpose: int | str) -> list[int]:
        """``count`` of ``range(among)`` without replacement, in rising order."""
        return sorted(torch.randperm(among, generator=self._generator(*purpose))[:count].tolist())

    def uniform(self, count: int, *purpose: int | str) -> list[float]:
        """``count`` numbers in [0, 1)."""
        drawn: list[float] = torch.rand(count, generator=self._generator(*purpose), dtype=torch.float64).tolist()
        return drawn

    def _generator(self, *purpose: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, self.iteration, *purpose))


def begin(
    policy: Policy, rollout: RolloutConfig, schedule: Schedule, images: Tensor, group_size: int, draw: Draw
) -> tuple[list[float], Tensor]:
    """The schedule's sigmas, and the images' noise at the first of them, (N, ...)."""
    sigmas = policy.model.sigmas(rollout.steps, rollout.shift, schedule)
    noise = draw.image_noise(policy.model.latent_shape, images, group_size, "initial noise").to(policy.device)
    return sigmas, noise * policy.model.initial_scale(sigmas[0])


def totals(device: torch.device, *names: str) -> dict[str, Tensor]:
    """Sums to add up where the numbers are; reading one for each micro-batch would wait for the device each time."""
    return {name: torch.zeros((), device=device) for name in names}


def average(sums: dict[str, Tensor], count: int, processes: Processes) -> Metrics:
    """What all processes' sums come to, a mean over ``count``; the one time that they are read."""
    summed = processes.sum(torch.stack(list(sums.values())))
    return dict(zip(sums, (summed / count).tolist(), strict=True))


class Algorithm(Protocol):
    """How to sample, and how to turn advantages into gradients. State lives in the algorithm's own copies."""

    advantage_std: AdvantageStd

    def sample(
        self, policy: Policy, conditioning: Conditioning, images: Tensor, group_size: int, draw: Draw
    ) -> Rollout:
        """The given images of the iteration, (N,), each from its row of ``conditioning``; without gradient."""

    def accumulate_gradient(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        draw: Draw,
        backward: Backward,
        processes: Processes,
    ) -> Metrics:
        """Add this process's share of one optimizer step's gradient, and say what to log.

        Args:
            rollout: this process's images of one part of the iteration.
            advantages: (P, G) of that part, of all processes' images.
        """

    def after_step(self, policy: Policy, step: int) -> None:
        """Called after optimizer step ``step`` (from 0)."""

    def state(self) -> dict[str, list[Tensor]]:
        """Copies of the adapter to checkpoint, by name, restored in place."""

    def resume(self, steps: int) -> None:
        """Called when ``state`` was restored to what it was after ``steps`` optimizer steps."""


def make_algorithm(config: RunConfig, policy: Policy) -> Algorithm:
    """The algorithm that the configuration names."""
    from dgpo_plugin.algorithms.dgpo import DGPO
    from dgpo_plugin.algorithms.flow_grpo import FlowGRPO

    size = config.training.micro_batch_size
    algorithm = config.algorithm
    if isinstance(algorithm, DGPOConfig):
        return DGPO(algorithm, config.rollout, config.schedule, policy, size)
    assert isinstance(algorithm, FlowGRPOConfig | FlowGRPOFastConfig)
    return FlowGRPO(algorithm, config.rollout, config.schedule, size)
