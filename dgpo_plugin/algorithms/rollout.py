"""Everything sampled in one iteration. Image n = p * G + g is image g of prompt group p, whoever samples it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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

    def __getitem__(self, rows: Tensor) -> Trajectory:
        return Trajectory(
            self.steps, self.noisy_latents[:, rows], self.next_latents[:, rows], self.log_probability[:, rows]
        )


@dataclass(frozen=True)
class Rollout:
    """Images of one iteration: all, one process's share of them, or a micro-batch.

    Attributes:
        images: which of the iteration's P * G they are, (N,), int64.
        conditioning: of each, (N, ...).
        latents: clean, (N, ...).
        sigmas: the sampler's schedule, steps + 1 falling values.
        trajectory: None for deterministic samplers.
        first_group: where the part of the iteration starts that these images are of.
    """

    images: Tensor
    conditioning: Conditioning
    latents: Tensor
    sigmas: list[float]
    trajectory: Trajectory | None = None
    first_group: int = 0

    def __getitem__(self, rows: Tensor) -> Rollout:
        return Rollout(
            self.images[rows],
            self.conditioning[rows],
            self.latents[rows],
            self.sigmas,
            None if self.trajectory is None else self.trajectory[rows],
            self.first_group,
        )

    def places(self, group_size: int) -> Tensor:
        """(N,): where each image stands among the images of its part of the iteration."""
        return self.images - self.first_group * group_size

    def split(self, groups: int, group_size: int, parts: int) -> Iterator[tuple[slice, Rollout]]:
        """Equal parts of an iteration's P prompt groups, each with its slice of the groups."""
        size = groups // parts
        for first in range(0, groups, size):
            group = self.images // group_size
            inside = ((group >= first) & (group < first + size)).nonzero().flatten()
            yield slice(first, first + size), replace(self[inside], first_group=first)


def join(parts: Sequence[Rollout]) -> Rollout:
    """Micro-batches of one iteration, in their order, as one rollout."""
    first = parts[0]
    trajectory = None
    if first.trajectory is not None:
        tracks = [part.trajectory for part in parts if part.trajectory is not None]
        trajectory = Trajectory(
            first.trajectory.steps,
            torch.cat([track.noisy_latents for track in tracks], dim=1),
            torch.cat([track.next_latents for track in tracks], dim=1),
            torch.cat([track.log_probability for track in tracks], dim=1),
        )
    return Rollout(
        torch.cat([part.images for part in parts]),
        Conditioning.concatenate([part.conditioning for part in parts]),
        torch.cat([part.latents for part in parts]),
        first.sigmas,
        trajectory,
    )


def micro_batches(rows: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Split rows (N,) into micro-batches; one if ``size`` is None, none if there are no rows."""
    return tuple(rows.split(size or len(rows))) if len(rows) else ()
