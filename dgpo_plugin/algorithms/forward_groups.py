"""The forward-process algorithms whose loss of an image needs a number of its whole prompt group (DGPO, CRD).

That number needs every sample of the group before any gradient. Where each micro-batch holds whole groups it is taken
from the pass that is differentiated; so it is, gathered from all processes, where a process has but one micro-batch;
else a first pass without gradient is for it alone. The result is the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dgpo_plugin.algorithms.base import Metric, Random, Totals
from dgpo_plugin.algorithms.flow_times import FlowTime, rounds_of
from dgpo_plugin.algorithms.forward import Forward, Noised, of_round
from dgpo_plugin.algorithms.rollout import Rollout, holds_whole_groups, micro_batches
from dgpo_plugin.config.fields import AlgorithmConfig, RunConfig

F = TypeVar("F", bound=AlgorithmConfig)
S = TypeVar("S")


GROUP_PASS = Metric(
    "group_pass",
    "count",
    "Passes without gradient, for each flow time, that are only for what a loss needs of whole prompt groups: 0 where "
    "every micro-batch holds whole groups (training.micro_batch_size a multiple of training.group_size), or a process "
    "has one micro-batch; else 1.",
    "0; a larger micro-batch, where memory allows, saves the pass and changes no result.",
)


class GroupAlgorithm(Forward[F], Generic[F, S]):
    """One whose loss of an image needs a number of its whole group at the same flow time."""

    SUMMARY: ClassVar[int]
    """K of :meth:`summary`."""

    @abstractmethod
    def frozen(self, noised: Noised, rows: Tensor) -> S:
        """What is measured of a micro-batch without gradient, under other weights than the policy's."""

    @abstractmethod
    def summary(self, predicted: Tensor, target: Tensor, frozen: S) -> Tensor:
        """What the group's number is made of, (n, K), without gradient."""

    @abstractmethod
    def group_number(self, summary: Tensor, advantages: Tensor) -> Tensor:
        """The groups' numbers, (P,), from (K, P, G) and advantages (P, G)."""

    @abstractmethod
    def loss(
        self, predicted: Tensor, target: Tensor, frozen: S, numbers: Tensor, advantages: Tensor, totals: Totals
    ) -> Tensor:
        """The sum of a micro-batch's losses, which is also added to the totals; numbers and advantages are (n,)."""

    @abstractmethod
    def totals(self, device: torch.device) -> Totals:
        """The sums that :meth:`loss` adds to."""

    def add_number(self, totals: Totals, numbers: Tensor) -> None:
        """Take notice of each sample's group's number, (N,)."""

    def keeps(self, advantages: Tensor) -> list[bool]:
        """Which groups are trained on, P of them, from (P, G)."""
        return [True] * len(advantages)

    def trained_images(self, advantages: Tensor) -> int:
        """Over how many images of all processes a loss is a mean, of (P, G)."""
        return advantages.numel()

    def noised_round(self, rollout: Rollout, times: Sequence[FlowTime], random: Random) -> Noised:
        """Every sample of the update once: at one flow time, or each prompt group at its own."""
        part, sigma = of_round(rollout, times)
        assert len(part.sample_ids) == len(rollout.sample_ids)
        return self.noised(part, times[0].number, sigma, random)

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        device = rollout.latents.device
        positions = rollout.positions.to(device)
        batches = self._micro_batches(rollout, advantages)
        totals, rounds = self.totals(device), rounds_of(self.flow_times(rollout, random))
        count = len(rounds) * self.trained_images(advantages)
        whole = self._whole_groups(advantages)
        for times in rounds:
            noised = self.noised_round(rollout, times, random)
            train = self._one_pass if whole else self._gathered
            train(noised, batches, positions, advantages, totals, count)
        first_pass = 0.0 if whole or self._fits_at_once(advantages) else 1.0
        return {**totals.means(count, self.processes), "group_pass": first_pass}

    def _one_pass(
        self,
        noised: Noised,
        batches: tuple[Tensor, ...],
        positions: Tensor,
        advantages: Tensor,
        totals: Totals,
        count: int,
    ) -> None:
        """Every micro-batch holds whole groups, in their order, and is looked at once."""
        size = advantages.shape[1]
        own = advantages.flatten()[positions]
        for rows in batches:
            frozen = self.frozen(noised, rows)
            predicted, target = self.predict(noised, rows), noised.target[rows]
            with torch.no_grad():
                summary = self.summary(predicted, target, frozen).T.reshape(-1, len(rows) // size, size)
                numbers = self.group_number(summary, own[rows].view(-1, size)).repeat_interleave(size)
            self.backward(self.loss(predicted, target, frozen, numbers, own[rows], totals) / count)
            self.add_number(totals, numbers)

    def _gathered(
        self,
        noised: Noised,
        batches: tuple[Tensor, ...],
        positions: Tensor,
        advantages: Tensor,
        totals: Totals,
        count: int,
    ) -> None:
        """Groups are cut: what they come to is gathered from all micro-batches and processes before any gradient."""
        own, groups = advantages.flatten()[positions], positions // advantages.shape[1]
        frozen = [self.frozen(noised, rows) for rows in batches]
        # A single micro-batch saves the first pass by using the one that it differentiates.
        only = self.predict(noised, batches[0]) if len(batches) == 1 else None
        numbers = self._group_numbers(noised, batches, frozen, only, positions, advantages)[groups]
        for rows, measured in zip(batches, frozen, strict=True):
            predicted = self.predict(noised, rows) if only is None else only
            given = (numbers[rows], own[rows])
            self.backward(self.loss(predicted, noised.target[rows], measured, *given, totals) / count)
        self.add_number(totals, numbers)

    @torch.no_grad()
    def _group_numbers(
        self,
        noised: Noised,
        batches: tuple[Tensor, ...],
        frozen: list[S],
        only: Tensor | None,
        positions: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        """The number of every prompt group of the update, (P,), from all processes' samples.

        Args:
            only: the prediction of the one micro-batch, if there is but one.
        """
        parts = noised.target.new_zeros(len(positions), self.SUMMARY)
        for rows, measured in zip(batches, frozen, strict=True):
            predicted = self.predict(noised, rows) if only is None else only
            parts[rows] = self.summary(predicted, noised.target[rows], measured).to(parts)
        everyone = self.processes.assemble(parts, positions, advantages.numel())
        return self.group_number(everyone.T.reshape(self.SUMMARY, *advantages.shape), advantages)

    def _micro_batches(self, rollout: Rollout, advantages: Tensor) -> tuple[Tensor, ...]:
        """The rows to run, those of groups that are trained on."""
        groups = (rollout.positions // advantages.shape[1]).tolist()
        kept = self.keeps(advantages)
        rows = [row for row, group in enumerate(groups) if kept[group]]
        return micro_batches(torch.tensor(rows, dtype=torch.int64, device=advantages.device), self.micro_batch_size)

    def _whole_groups(self, advantages: Tensor) -> bool:
        """Whether every micro-batch of every process holds whole groups; the same everywhere, from what all know."""
        dealt_whole = holds_whole_groups(len(advantages), self.processes.count)
        size = self.micro_batch_size
        return dealt_whole and size is not None and size % advantages.shape[1] == 0

    def _fits_at_once(self, advantages: Tensor) -> bool:
        """Whether no process can have more than one micro-batch."""
        share = -(-advantages.numel() // self.processes.count)
        return self.micro_batch_size is None or share <= self.micro_batch_size


def needs_group_pass(config: RunConfig) -> bool:
    """Whether a run of one process looks at its samples a first time for their groups' sake."""
    size, training = config.training.micro_batch_size, config.training
    share = training.images // training.updates_per_iteration
    return size is not None and size < share and size % training.group_size != 0
