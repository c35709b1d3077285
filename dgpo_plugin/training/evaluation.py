"""The prompts of the evaluation, sampled as an adapter's users will sample, and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import EvaluationConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.generate import fixed_noise, generate
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.prompts.overlap import overlapping
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.prompt_groups import PromptGroups
from dgpo_plugin.training.unscored import HeldOutMean, held_out_mean

HELD_OUT = "held-out prompts"


def call_prompts(train: Sequence[Prompt], evaluated: Sequence[Prompt] | None) -> str:
    """What the prompts that a run is measured on are called.

    Texts are compared without regard to case and white space.

    Args:
        evaluated: None where those of ``train`` are.
    """
    if evaluated is None:
        return "training prompts"
    seen = trained_on(train, evaluated)
    if not seen:
        return HELD_OUT
    return "training prompts" if len(seen) == len(evaluated) else f"{len(evaluated)} prompts, {len(seen)} trained on"


def trained_on(train: Sequence[Prompt], evaluated: Sequence[Prompt]) -> list[Prompt]:
    """Those of the prompts for evaluation that are trained on, in these or in other words (:func:`overlapping`)."""
    return [evaluated[index] for index in sorted({index for _, index in overlapping(train, evaluated)})]


@dataclass(frozen=True)
class HeldOut:
    """What a run is measured on, held out or not; every process does its share of the pictures.

    Attributes:
        prompts: one for each picture in turn, from the first again if there are fewer.
        groups: has the texts, encoded.
        batch_size: pictures at once.
        called: what the prompts are, for people: held out only if none of them is trained on (:func:`call_prompts`).
    """

    policy: Policy
    scorer: Scorer
    prompts: list[Prompt]
    groups: PromptGroups
    setting: EvaluationConfig
    processes: Processes
    batch_size: int
    called: str = HELD_OUT

    @property
    def reward_name(self) -> str:
        """What the reward of these prompts is called."""
        return "held-out reward" if self.called == HELD_OUT else f"reward on {self.called}"

    def first(self, count: int) -> list[Prompt]:
        """So many prompts, in order, from the first again after the last."""
        return [self.prompts[index % len(self.prompts)] for index in range(count)]

    def sample(self, weights: Mapping[str, Tensor], prompts: Sequence[Prompt], seed: int) -> Tensor:
        """Pictures under a copy of the adapter, from fixed noises, (N, 3, H, W) in [0, 1], on every process."""
        pictures, positions = self._sample_share(weights, prompts, seed)
        if self.processes.count == 1:
            return pictures
        return self.processes.assemble(pictures.to(self.policy.device), positions, len(prompts)).cpu()

    def mean(self, weights: Mapping[str, Tensor]) -> HeldOutMean:
        """Mean reward of ``evaluation.images`` pictures under a copy of the adapter, and how many were scored.

        Raises:
            UserError: a reward failed, or skipped them all.
        """
        prompts = self.first(self.setting.images)
        pictures, positions = self._sample_share(weights, prompts, seed=0)
        own = [prompts[n] for n in positions.tolist()]
        futures = [self.scorer.submit(pictures, own)] if own else []
        scores = gather_scores(self.scorer, futures, positions, len(prompts), self.processes, self.policy.device)
        return held_out_mean(scores, self.scorer, self.processes)

    def _sample_share(
        self, weights: Mapping[str, Tensor], prompts: Sequence[Prompt], seed: int
    ) -> tuple[Tensor, Tensor]:
        """This process's pictures of them, on the CPU, and which they are."""
        share, kept = self.processes.even_share(len(prompts))
        texts = [prompts[n].text for n in share]
        model, setting = self.policy.model, self.setting
        noise = fixed_noise(model, share, seed)
        with self.policy.with_weights(weights):
            pictures = generate(
                model, texts, noise, setting.steps, setting.guidance, self.batch_size, self.groups.encoded
            )
        return pictures[:kept], torch.tensor(share[:kept], dtype=torch.int64)


def gather_scores(
    scorer: Scorer,
    futures: Sequence[Future[tuple[Tensor, float]]],
    positions: Tensor,
    total: int,
    processes: Processes,
    device: torch.device,
) -> Tensor:
    """Every process's scores at their positions, (total, K); a reward that failed anywhere ends them all.

    NaN stands where a reward has skipped a picture.

    Args:
        futures: of this process's micro-batches, in the order of ``positions``, (N,).

    Raises:
        UserError: a reward failed on any process.
    """
    problem: str | None = None
    scores = torch.zeros(len(positions), len(scorer.rewards.names))
    try:
        if futures:
            scores = torch.cat([future.result()[0] for future in futures])
    except UserError as error:
        problem = str(error)
    processes.fail_together(problem)
    return processes.assemble(scores.to(device), positions, total)
