"""Everything sampled in one iteration, flat over images: image n = p * G + g is image g of prompt group p."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.models.conditioning import Conditioning


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of a rollout, for policy gradients.

    Attributes:
        steps: indices into the schedule, (T,).
        noisy_latents: before each step, (T, N, ...), float32.
        next_latents: after it, (T, N, ...).
        log_probability: of that step under the policy that took it, (T, N).
    """

    steps: list[int]
    noisy_latents: Tensor
    next_latents: Tensor
    log_probability: Tensor


@dataclass(frozen=True)
class Rollout:
    """What one iteration sampled.

    Attributes:
        conditioning: of every image, (N, ...).
        latents: clean, (N, ...).
        sigmas: the sampler's schedule, steps + 1 falling values.
        group_size: G; N = P * G.
        slots: the place of each prompt group in the iteration, (P,): the key of its random draws.
        trajectory: None for deterministic samplers.
    """

    conditioning: Conditioning
    latents: Tensor
    sigmas: list[float]
    group_size: int
    slots: list[int]
    trajectory: Trajectory | None = None

    @property
    def groups(self) -> int:
        return len(self.slots)

    def split(self, parts: int) -> Iterator[tuple[slice, Rollout]]:
        """The rollout in equal parts of whole prompt groups, each with its slice of the groups."""
        size = self.groups // parts
        for start in range(0, self.groups, size):
            groups = slice(start, start + size)
            images = slice(start * self.group_size, (start + size) * self.group_size)
            yield groups, self._take(groups, images)

    def _take(self, groups: slice, images: slice) -> Rollout:
        trajectory = self.trajectory and Trajectory(
            self.trajectory.steps,
            self.trajectory.noisy_latents[:, images],
            self.trajectory.next_latents[:, images],
            self.trajectory.log_probability[:, images],
        )
        return Rollout(
            self.conditioning[images],
            self.latents[images],
            self.sigmas,
            self.group_size,
            self.slots[groups],
            trajectory,
        )


def micro_batches(indices: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Split image indices (N,) into micro-batches; the whole if ``size`` is None."""
    return tuple(indices.split(size or max(1, len(indices))))


def per_image(group_values: Tensor, group_size: int) -> Tensor:
    """(P, ...) -> (N, ...): each group's value for each of its images."""
    return torch.repeat_interleave(group_values, group_size, dim=0)
