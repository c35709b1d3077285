"""DGPO: direct preference optimization of prompt groups with deterministic sampling (arXiv 2510.08425).

The loss first, as pure functions on tensors; then its configuration, and the class that samples, measures matching
errors and differentiates, micro-batch by micro-batch and still with the whole group's exact weight.

It follows the authors' released code, which is not their paper:
1. d is the velocity's error and a mean over dims; the paper has the clean picture's, a sum, weighted with lambda_t.
2. The flow times are M of the rollout's noisiest steps, one set an iteration; the paper's is continuous (``t_min``).
3. Images that left a trust region around the old policy give no gradient; the paper has none (``clip: null``).
4. A KL term holds the policy to the frozen base; the paper has none (``kl_weight: 0``).
5. No text is dropped in training; the paper drops 5 % (``text_dropout``).
6. The old policy's decay rises to 0.3 over 300 steps; the paper's is 0.3 from the switch on.
7. Advantages are clipped to +-5, and their spread may be that of the whole iteration (``advantage_std``).
8. The reference may be the old policy (``reference``), which is TDM-R1's (arXiv 2603.07700).
9. The velocities in the loss may be guided as the rollout's are (``training_guidance``, ``reference_guidance``); there
   as in the paper they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random, Totals, log_norm
from dgpo_plugin.algorithms.flow_times import FlowTime, noisiest_steps, uniform_times
from dgpo_plugin.algorithms.forward import (
    GuidedForwardConfig,
    Noised,
    forward_cost,
    matching_error,
)
from dgpo_plugin.algorithms.forward_groups import GROUP_PASS, GroupAlgorithm, needs_group_pass
from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig, Schedule


def group_weight(error: Tensor, reference_error: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """w = sigmoid(S), S = (beta / G) sum over the group of A (d - d_ref); all inputs (P, G), output (P,).

    The derivative of -log sigmoid(-S) in S (equation 14): large where the group is still ranked wrongly.
    """
    return torch.sigmoid(beta * (advantages * (error - reference_error)).mean(1))


def clipped(error: Tensor, old_error: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Which images have left the trust region, boolean like the inputs.

    ratio = exp(d_old - d); out where A > 0 and ratio > 1 + c, or A <= 0 and ratio < 1 - c.
    """
    ratio = torch.exp(old_error - error)
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)


def dgpo_loss(error: Tensor, weight: Tensor, advantages: Tensor, is_clipped: Tensor) -> Tensor:
    """w A d for each image, (N,); gradient flows through d alone, and not through clipped images' d.

    The gradient of its mean over all images is that of the mean over groups of -log sigmoid(-S), divided by beta:
    beta shapes the weight, not the step.
    """
    kept = torch.where(is_clipped, error.detach(), error)
    return weight.detach() * advantages * kept


class DGPOConfig(GuidedForwardConfig):
    """DGPO; the defaults are its GenEval setting with a guided rollout."""

    name: Literal["dgpo"] = "dgpo"
    beta: float = Field(
        100.0, gt=0, description="Sharpness of the group weight w = sigmoid(S); it shapes the weight, not the step."
    )
    kl_weight: float = Field(
        0.02, ge=0, description="Weight of the squared distance between the policy's and the frozen base's velocity."
    )
    clip: float | None = Field(
        1e-2,
        gt=0,
        description="Half-width of the trust region on exp(d_old - d); null for none, which saves a pass.",
    )
    timesteps: int = Field(
        4, ge=1, description="M, sampler steps trained on in an iteration, drawn without replacement."
    )
    noisiest_steps: int = Field(5, ge=1, description="K, the noisiest sampler steps, which they are drawn from.")
    t_min: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Train instead on M flow times drawn uniformly from [t_min, the rollout's first sigma], as in the "
        "paper, which names shift(0.3) and shift(0.4): .5625 and .6667 at shift 3; noisiest_steps then has no say. "
        "Null for sampler steps, as in the released code.",
    )
    text_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of prompt groups, drawn anew for each timestep, that are trained on the empty prompt in all "
        "passes; the paper's is 0.05, the released code has none.",
    )
    old_policy_after: int = Field(
        500,
        ge=0,
        description="Optimizer steps; the rollout comes from the old policy in iterations that begin with more done.",
    )
    reference: Literal["base", "old_policy"] = Field(
        "base", description="What d_ref is measured under: the frozen base, or the old policy (TDM-R1)."
    )
    rollout_guidance: float = Field(4.5, ge=1, description="Classifier-free guidance of the rollout; 1 is none.")

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if self.t_min is None and steps < self.noisiest_steps:
            raise ValueError(
                f"rollout.steps ({steps}) must be at least {self.noisiest_steps} for algorithm.noisiest_steps"
            )

    @model_validator(mode="after")
    def _timesteps_fit(self) -> DGPOConfig:
        if self.t_min is None and self.timesteps > self.noisiest_steps:
            raise ValueError(f"timesteps ({self.timesteps}) cannot exceed noisiest_steps ({self.noisiest_steps})")
        return self


@dataclass(frozen=True)
class _Frozen:
    """What is measured of a micro-batch without gradient at one flow time, all (N,) but the velocity."""

    reference_error: Tensor
    old_error: Tensor | None
    base_velocity: Tensor | None
    base_log_norm: Tensor | None


class DGPO(GroupAlgorithm[DGPOConfig, _Frozen]):
    """The policy, its old copy, and the frozen base, measured on the same noised samples."""

    Config = DGPOConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of w A d + kl_weight kl; mean over the iteration's updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        Metric(
            "clip_fraction",
            "share, 0 to 1",
            "Images and timesteps outside the trust region around the old policy, which give no gradient.",
            "Low; 0 while the old policy is the policy, or with clip: null. Near 1 nothing is learned: clip is too "
            "narrow for the learning rate.",
            shown="clipped {:5.1%}",
        ),
        Metric(
            "kl",
            "velocity squared",
            "Mean squared distance of the policy's velocity from the frozen base's; 0 where kl_weight is 0.",
            "Rises from its start and levels off; one that runs away leaves the base behind: raise kl_weight or lower "
            "the learning rate. With reference_guidance the start is not 0.",
            shown="kl {:.4f}",
        ),
        Metric(
            "group_weight",
            "share, 0 to 1",
            "Mean of w = sigmoid(S) over the prompt groups, S = (beta / G) times the sum of A (d - d_ref).",
            "Around 0.5 at the start. Below it the groups are ranked better than by the reference, above it worse.",
        ),
        GROUP_PASS,
        GROWTH,
    )
    SUMMARY = 2

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, DGPOConfig)
        passes = algorithm.differentiated_passes
        if algorithm.reference == "base" or algorithm.kl_weight > 0:
            passes += algorithm.base_passes
        if algorithm.reference == "old_policy" or algorithm.clip is not None:
            passes += algorithm.passes
        if needs_group_pass(config):
            passes += algorithm.passes
        return forward_cost(config, algorithm.timesteps, passes)

    _steps_done = 0

    @property
    def _old_is_policy(self) -> bool:
        """Before the first step, and after it with mu = 0, the old copy is the policy itself."""
        return self._steps_done <= 1

    @property
    def rollout_weights(self) -> Mapping[str, Tensor] | None:
        switched = self._steps_done > self.config.old_policy_after and not self._old_is_policy
        return self.old_weights if switched else None

    @property
    def group_noise(self) -> bool:
        """One noise for a whole prompt group: its samples then differ in the picture alone."""
        return True

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        """The flow times to train on, the same for every sample."""
        config, sigmas = self.config, rollout.sigmas
        if config.t_min is None:
            return noisiest_steps(sigmas, config.timesteps, config.noisiest_steps, random)
        if config.t_min >= sigmas[0]:
            raise UserError(f"algorithm.t_min {config.t_min}: the rollout starts at {sigmas[0]:.4f}; set it lower")
        return uniform_times(sigmas[0], config.t_min, config.timesteps, random)

    def noised(self, rollout: Rollout, number: int, sigmas: float | Sequence[float], random: Random) -> Noised:
        """As in the family; the texts that are dropped are drawn by the number too."""
        noised = super().noised(rollout, number, sigmas, random)
        share = self.config.text_dropout
        if share == 0:
            return noised
        groups = rollout.layout.groups_of(rollout.sample_ids).tolist()
        lost = {g for g in set(groups) if random.uniform(1, "text dropout", number, g)[0] < share}
        dropped = torch.tensor([group in lost for group in groups], dtype=torch.bool, device=noised.latents.device)
        return replace(noised, conditioning=noised.conditioning.replaced(dropped, self.policy.unconditional))

    def keeps(self, advantages: Tensor) -> list[bool]:
        """A group of equal rewards moves nothing, only the KL term would need it."""
        everyone = self.config.kl_weight > 0 or self.processes.lockstep
        return [True] * len(advantages) if everyone else (advantages != 0).any(1).tolist()

    def totals(self, device: torch.device) -> Totals:
        looks_at_base = self.config.reference == "base" or self.config.kl_weight > 0
        growth = ("velocity_growth",) if looks_at_base else ()
        return Totals(device, "loss", "kl", "clip_fraction", "group_weight", *growth)

    def add_number(self, totals: Totals, numbers: Tensor) -> None:
        totals.add("group_weight", numbers.sum())

    def summary(self, predicted: Tensor, target: Tensor, frozen: _Frozen) -> Tensor:
        return torch.stack([matching_error(predicted, target), frozen.reference_error], dim=1)

    def group_number(self, summary: Tensor, advantages: Tensor) -> Tensor:
        error, reference = summary
        return group_weight(error, reference, advantages, self.config.beta)

    def loss(
        self,
        predicted: Tensor,
        target: Tensor,
        frozen: _Frozen,
        numbers: Tensor,
        advantages: Tensor,
        totals: Totals,
    ) -> Tensor:
        config, error = self.config, matching_error(predicted, target)
        out = torch.zeros_like(error, dtype=torch.bool)
        if frozen.old_error is not None and config.clip is not None:
            out = clipped(error.detach(), frozen.old_error, advantages, config.clip)
        loss = dgpo_loss(error, numbers, advantages, out).sum()
        if frozen.base_velocity is not None:
            kl = matching_error(predicted, frozen.base_velocity).sum()
            loss = loss + config.kl_weight * kl
            totals.add("kl", kl.detach())
        if frozen.base_log_norm is not None:
            totals.add("velocity_growth", (log_norm(predicted) - frozen.base_log_norm).sum())
        totals.add("loss", loss.detach())
        totals.add("clip_fraction", out.sum())
        return loss

    @torch.no_grad()
    def frozen(self, noised: Noised, rows: Tensor) -> _Frozen:
        """Matching errors under the reference and the old policy; forwards whose result is known are skipped."""
        config, policy, target = self.config, self.policy, noised.target[rows]
        old_error = base_velocity = base_log_norm = None
        needs_old = config.clip is not None or config.reference == "old_policy"
        if needs_old and not self._old_is_policy:
            with policy.with_weights(self.old_weights):
                old_error = matching_error(self.predict(noised, rows), target)
        elif config.reference == "old_policy":
            old_error = matching_error(self.predict(noised, rows), target)
        if config.reference == "base" or config.kl_weight > 0:
            with policy.as_reference():
                base_velocity = noised.predict(policy, rows, config.reference_guidance)
            base_log_norm = log_norm(base_velocity)
        if config.reference == "old_policy":
            assert old_error is not None
            reference_error = old_error
        else:
            assert base_velocity is not None
            reference_error = matching_error(base_velocity, target)
        kept = base_velocity if config.kl_weight > 0 else None
        return _Frozen(reference_error, old_error, kept, base_log_norm)

    def after_step(self, step: int) -> None:
        """Move the old policy: old <- mu old + (1 - mu) policy, mu = min(0.3, 0.001 step)."""
        self.move_old(min(0.3, 0.001 * step))
        self.resume(step + 1)

    def resume(self, steps: int) -> None:
        self._steps_done = steps
