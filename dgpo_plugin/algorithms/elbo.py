"""A policy gradient on the likelihood's bound (ELBO): V-GRPO (arXiv 2604.23380), and what its switches make of it.

The matching error at a few flow times stands for minus the log-likelihood of a finished picture. The defaults are
V-GRPO's; ``normalized: false`` and no clips are the plain gradient of 2602.04663, and with ``scale: .5``,
``shared_noise`` and ``steps: noisiest`` that is DGPO whose weight is always 1/2.

It follows what others read of the released code (tang-bd/v-grpo, which we have not seen ourselves):
1. Each error is of the clean picture, divided by its own size without gradient (``normalized``).
2. Advantages are clipped to +-5, and softly once more (``soft_clip``), of which the authors say that it does not suit
   coarse rewards; what they do there instead is not known to us.
3. The old policy is the policy as the iteration began. In an iteration's first update the ratio is exactly 1, so there
   it asks for no pass; in later ones a pass without gradient has the mean over all flow times inside the exponent.
4. Without ``ratio_clip`` there is no ratio: the advantage weighs the error itself.
5. The flow times are one set an iteration, for all prompts; there they are drawn anew for every update, with the noise.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random, Totals
from dgpo_plugin.algorithms.flow_times import FlowTime, noisiest_steps, one_of_each, strata
from dgpo_plugin.algorithms.forward import (
    KL,
    ForwardAlgorithm,
    GuidedForwardConfig,
    Seen,
    forward_cost,
    matching_error,
    normalized_error,
)
from dgpo_plugin.algorithms.rollout import Rollout, micro_batches
from dgpo_plugin.config.fields import RunConfig, Schedule


def softly_clipped(advantages: Tensor, limit: float) -> Tensor:
    """limit tanh(A / limit): as A near 0, within +-limit."""
    return limit * torch.tanh(advantages / limit)


def ratio_weights(ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """What -min(ratio A, clip(ratio, 1 - c, 1 + c) A) is differentiated with, for ratio = exp(l_old - l).

    Returns:
        A ratio where the minimum moves with the ratio and 0 elsewhere, which is its slope in l, (N,); and where the
        minimum stands still, boolean, (N,).
    """
    out = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return (advantages * ratio).masked_fill(out, 0), out


class ElboConfig(GuidedForwardConfig):
    """A policy gradient on the ELBO; the defaults are V-GRPO's with FLUX.1."""

    name: Literal["elbo"] = "elbo"
    normalized: bool = Field(
        True, description="Divide each clean picture's error by its own size; false is the velocity's mean square."
    )
    shared_noise: bool = Field(True, description="One noise for all images of a prompt; false for one each.")
    scale: float = Field(1.0, gt=0, description="Weight of the policy term; .5 without clips is DGPO with w = 1/2.")
    ratio_clip: float | None = Field(
        None,
        gt=0,
        description="Half-width of the clip on exp(l_old - l), for several updates a rollout; null for none.",
    )
    soft_clip: float | None = Field(None, gt=0, description="eta, where eta tanh(A / eta) replaces A; null for A.")
    steps: Literal["strata", "noisiest"] = Field(
        "strata", description="Sampler steps trained on: one of each of as many runs, or drawn from the noisiest."
    )
    timesteps: int = Field(4, ge=1, description="N, sampler steps trained on in an iteration.")
    noisiest_steps: int = Field(5, ge=1, description="Steps that they are drawn from, with steps: noisiest.")
    kl_weight: float = Field(
        0.0, ge=0, description="Weight of the squared distance between the policy's and the frozen base's velocity."
    )
    old_weight: float = Field(
        0.0, ge=0, description="Weight of the squared distance between the policy's and the old policy's clean picture."
    )

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        least = self.timesteps if self.steps == "strata" else self.noisiest_steps
        if steps < least:
            which = "timesteps" if self.steps == "strata" else "noisiest_steps"
            raise ValueError(f"rollout.steps ({steps}) must be at least {least} for algorithm.{which}")

    @model_validator(mode="after")
    def _timesteps_fit(self) -> ElboConfig:
        if self.steps == "noisiest" and self.timesteps > self.noisiest_steps:
            raise ValueError(f"timesteps ({self.timesteps}) cannot exceed noisiest_steps ({self.noisiest_steps})")
        return self


class Elbo(ForwardAlgorithm[ElboConfig]):
    """The rollout is the policy's own; the old copy is what it was then."""

    Config = ElboConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of the error, times A and in later updates the ratio, + kl_weight kl + "
            "old_weight times the squared distance from the old policy's clean picture; mean over the updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        Metric(
            "clip_fraction",
            "share, 0 to 1",
            "Images whose ratio has left the clip, which give no gradient; 0 in an iteration's first update.",
            "Low. Near 1 nothing is learned: ratio_clip is too narrow for the learning rate.",
            shown="clipped {:5.1%}",
        ),
        KL,
        GROWTH,
    )

    @property
    def group_noise(self) -> bool:
        return self.config.shared_noise

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, ElboConfig)
        base = algorithm.base_passes if algorithm.kl_weight > 0 else 0
        ratio = 2 if algorithm.ratio_clip is not None and config.training.updates > 1 else 0
        others = algorithm.passes * ((algorithm.old_weight > 0) + ratio)
        return forward_cost(config, algorithm.timesteps, algorithm.differentiated_passes + base + others)

    @property
    def base_guidance(self) -> float | None:
        return self.config.reference_guidance if self.config.kl_weight > 0 else None

    @property
    def looks_at_old(self) -> bool:
        return self.config.old_weight > 0

    @property
    def trained_times(self) -> int:
        return self.config.timesteps

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        config, sigmas = self.config, rollout.sigmas
        if config.steps == "noisiest":
            return noisiest_steps(sigmas, config.timesteps, config.noisiest_steps, random)
        return one_of_each(sigmas, strata(0, len(sigmas) - 2, config.timesteps), random)

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        config, clipped = self.config, 0.0
        if config.soft_clip is not None:
            advantages = softly_clipped(advantages, config.soft_clip)
        # In an iteration's first update the policy is still the one that sampled.
        if config.ratio_clip is not None and not rollout.first_update:
            positions = rollout.positions.to(advantages.device)
            ratio = self._ratio(rollout, random).to(advantages)
            weights, out = ratio_weights(ratio, advantages.flatten()[positions], config.ratio_clip)
            advantages = torch.zeros_like(advantages).flatten().index_copy(0, positions, weights).view_as(advantages)
            total = Totals(advantages.device, "clipped")
            total.add("clipped", out.sum())
            clipped = total.means(advantages.numel(), self.processes)["clipped"]
        return {**super().gradient(rollout, advantages, random), "clip_fraction": clipped}

    @torch.no_grad()
    def _ratio(self, rollout: Rollout, random: Random) -> Tensor:
        """exp(l_old - l) of this process's samples, (N,), l being the mean error over the flow times."""
        times = self.flow_times(rollout, random)
        difference = rollout.latents.new_zeros(len(rollout.sample_ids))
        for time in times:
            noised = self.noised(rollout, time.number, time.sigma, random)
            for rows in micro_batches(torch.arange(len(difference), device=difference.device), self.micro_batch_size):
                with self.policy.with_weights(self.old_weights):
                    old = self._surrogate(self.predict(noised, rows), noised.target[rows], time.sigma)
                new = self._surrogate(self.predict(noised, rows), noised.target[rows], time.sigma)
                difference[rows] += (old - new).to(difference)
        return torch.exp(difference / len(times))

    def _surrogate(self, predicted: Tensor, target: Tensor, sigma: float | Tensor) -> Tensor:
        """l of each image, (N,), which stands for minus its log-likelihood."""
        if self.config.normalized:
            return normalized_error(predicted, target, sigma)
        return matching_error(predicted, target)

    def losses(self, seen: Seen, advantages: Tensor) -> Tensor:
        config = self.config
        losses = config.scale * advantages * self._surrogate(seen.predicted, seen.target, seen.sigma)
        if seen.base is not None:
            losses = losses + config.kl_weight * matching_error(seen.predicted, seen.base)
        if seen.old is not None:
            losses = losses + config.old_weight * seen.sigma**2 * matching_error(seen.predicted, seen.old)
        return losses

    def after_iteration(self, iteration: int, steps: int) -> None:
        """The old policy is the policy as the next iteration begins."""
        self.move_old(0.0)
