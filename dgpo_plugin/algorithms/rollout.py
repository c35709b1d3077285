"""What is sampled in one iteration: which samples, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning


@dataclass(frozen=True)
class Layout:
    """An iteration's samples: sample p * G + g is image g of prompt group p, whoever samples it.

    Attributes:
        groups: P, prompt groups.
        group_size: G, samples of each.
    """

    groups: int
    group_size: int

    @property
    def samples(self) -> int:
        """P * G."""
        return self.groups * self.group_size

    def groups_of(self, sample_ids: Tensor) -> Tensor:
        """The prompt group of each sample, (N,)."""
        return sample_ids // self.group_size

    def indices_of(self, sample_ids: Tensor) -> list[tuple[int, int]]:
        """Prompt group and number in it of each sample, N pairs."""
        return [divmod(sample, self.group_size) for sample in sample_ids.tolist()]

    def share(self, processes: Processes, updates: int = 1) -> Tensor:
        """A process's samples, rising, (n,), int64: whole prompt groups where they can be dealt, else one by one.

        Args:
            updates: of the iteration, each of as many groups.
        """
        if not holds_whole_groups(self.groups // updates, processes.count):
            return processes.share(self.samples)
        groups = processes.share(self.groups)
        return (groups[:, None] * self.group_size + torch.arange(self.group_size)).flatten()


def holds_whole_groups(groups: int, processes: int) -> bool:
    """Whether an update of so many prompt groups is dealt to processes in whole ones; known to all of them."""
    return groups % processes == 0


@dataclass(frozen=True)
class Batch:
    """What is to be sampled at once: a micro-batch of an iteration's samples.

    Attributes:
        sample_ids: which they are, (N,), int64, on the CPU.
        layout: of the iteration.
        conditioning: of each, N rows.
        sigmas: the sampler's schedule, steps + 1 falling values.
    """

    sample_ids: Tensor
    layout: Layout
    conditioning: Conditioning
    sigmas: list[float]


@dataclass(frozen=True)
class Rollout:
    """Samples of one iteration: all, one process's share of them, a micro-batch, or those of one update.

    Every tensor here, and every one that a subclass adds, has a row for each sample; a tuple has an entry for each
    micro-batch that was sampled.

    Attributes:
        sample_ids: which of the iteration's they are, (N,), int64, on the CPU.
        conditioning: of each, N rows.
        latents: clean, (N, ...).
        sigmas: the sampler's schedule, steps + 1 falling values.
        layout: of the iteration.
        first_group: the first prompt group of the update that they are for.
        first_update: that is the iteration's first, so that the policy is still the one that sampled.
    """

    sample_ids: Tensor
    conditioning: Conditioning
    latents: Tensor
    sigmas: list[float]
    layout: Layout
    first_group: int = 0
    first_update: bool = True

    @property
    def positions(self) -> Tensor:
        """Where each sample stands among all samples of its update, (N,), on the CPU."""
        return self.sample_ids - self.first_group * self.layout.group_size

    def select(self: R, rows: Tensor) -> R:
        """Some of them, by their row here."""
        return replace(self, **{name: value[rows] for name, value in self.per_sample().items()})

    def per_update(self: R, updates: int, epoch: int = 0) -> Iterator[tuple[slice, R]]:
        """Equal parts of the prompt groups, each with the slice of the groups that it is of.

        Args:
            epoch: how often they were all gone through before.
        """
        size = self.layout.groups // updates
        group = self.layout.groups_of(self.sample_ids)
        for first in range(0, self.layout.groups, size):
            inside = ((group >= first) & (group < first + size)).nonzero().flatten()
            its, is_first = self.select(inside), epoch == 0 and first == 0
            yield slice(first, first + size), replace(its, first_group=first, first_update=is_first)

    def per_sample(self) -> dict[str, Any]:
        """What has a row for each sample, by the names of its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | Conditioning)}

    def per_micro_batch(self) -> list[str]:
        """The names of the fields that have an entry for each micro-batch."""
        return [field.name for field in fields(self) if isinstance(getattr(self, field.name), tuple)]


R = TypeVar("R", bound=Rollout)


def join(rollouts: Sequence[R]) -> R:
    """Micro-batches of one iteration, in their order, as one rollout."""
    tables = [rollout.per_sample() for rollout in rollouts]

    def joined(name: str) -> Any:
        values = [table[name] for table in tables]
        return torch.cat(values) if isinstance(values[0], Tensor) else Conditioning.concatenate(values)

    parts: dict[str, Any] = {
        name: tuple(entry for each in rollouts for entry in getattr(each, name))
        for name in rollouts[0].per_micro_batch()
    }
    return replace(rollouts[0], **{name: joined(name) for name in tables[0]}, **parts)


def micro_batches(rows: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Split rows (N,) into micro-batches; one if ``size`` is None, none if there are no rows."""
    return tuple(rows.split(size or len(rows))) if len(rows) else ()
