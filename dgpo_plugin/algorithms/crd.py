"""Centered Reward Distillation, CRD (arXiv 2603.14128): the policy's implied reward is regressed on the real one.

No official code was found; it follows Flow-Factory's, which has the authors' option names (a0b2bc5, trainers/crd.py):
1. Both rewards are centred in their prompt group, as in the paper; there over whatever images the GPUs hold at once,
   so that their number changes the result.
2. The flow times are one set an iteration, there each image's own; the noise is each image's own in both.
3. Only the uniform, squared loss is built: no cross-entropy, no centring weighted in two directions.
4. The reward is (A + 5) / 10 of advantages clipped to +-5, whose spread is the iteration's (``advantage_std``).
5. The anchor holds good pictures to the (guided) base hardest, as published.
6. The mean of the absolute error is in the type of the latents, there in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random, Totals, log_norm
from dgpo_plugin.algorithms.flow_times import FlowTime, stratified_steps
from dgpo_plugin.algorithms.forward import (
    KL,
    Noised,
    OdeForwardConfig,
    forward_cost,
    matching_error,
    normalized_error,
)
from dgpo_plugin.algorithms.forward_groups import GROUP_PASS, GroupAlgorithm, needs_group_pass
from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.config.fields import AdvantageStd, RunConfig, Schedule
from dgpo_plugin.models.base import guided_passes
from dgpo_plugin.models.copies import move_towards

SCALE = 5.0
"""The advantages' limit, by which the loss is multiplied."""
LEAST_ANCHOR = 1e-4
"""What the anchor weighs at a reward of 0."""


def reward_of(advantages: Tensor) -> Tensor:
    """r in [0, 1]: (A + 5) / 10."""
    return (advantages / (2 * SCALE) + 0.5).clamp(0, 1)


def implied_reward(predicted: Tensor, target: Tensor, old_error: Tensor) -> Tensor:
    """rho, (N,): how much better the policy's velocity is than the old one's, both errors over their own size.

    Args:
        old_error: that of the old policy, (N,).
    """
    return old_error - normalized_error(predicted, target, 1.0)


def group_offset(implied: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """What centring takes from beta rho - r, (P,): beta times the group's mean rho less its mean r, of (P, G) each."""
    return beta * implied.mean(1) - rewards.mean(1)


def crd_loss(implied: Tensor, rewards: Tensor, offset: Tensor, beta: float) -> Tensor:
    """(5 / beta) (beta (rho - mean rho) - (r - mean r))^2 for each image, (N,); no gradient flows through the means."""
    return SCALE / beta * (beta * implied - rewards - offset.detach()).square()


def anchor_weight(rewards: Tensor, weight: float) -> Tensor:
    """lambda (c + r (1 - c)), (N,), with c = 1e-4 / lambda: 1e-4 at a reward of 0, lambda at 1."""
    return LEAST_ANCHOR + rewards * (weight - LEAST_ANCHOR)


class CRDConfig(OdeForwardConfig):
    """CRD; the defaults are Flow-Factory's setting for OCR."""

    name: Literal["crd"] = "crd"
    beta: float = Field(1.0, gt=0, description="How large an implied reward is asked for, against the real one.")
    anchor_weight: float = Field(
        0.1,
        ge=0,
        description="lambda, weight of the squared distance from the frozen base's velocity, for a reward of 1; it "
        "falls to 1e-4 at 0. 0 for no anchor.",
    )
    reference_guidance: float = Field(
        4.5, ge=1, description="Classifier-free guidance of the frozen base's velocity; 1 is none."
    )
    timesteps: int = Field(20, ge=1, description="Flow times trained on in an iteration, each in its own stratum.")
    noisiest_steps: int = Field(9, ge=1, description="Sampler steps, the noisiest, that the strata are of.")
    old_start: float = Field(0.25, ge=0, lt=1, description="The old policy's share at the first step.")
    old_rate: float = Field(0.005, ge=0, description="What that share rises by with each step.")
    old_limit: float = Field(0.999, ge=0, lt=1, description="What it ends at.")
    sampler_after: int = Field(
        75, ge=0, description="Optimizer steps until which the rollout comes from the policy itself."
    )
    sampler_rate: float = Field(
        0.0075, ge=0, description="What the share of the copy that it comes from then rises by with each step."
    )
    sampler_limit: float = Field(0.999, ge=0, lt=1, description="What that share ends at.")
    advantage_std: AdvantageStd = "iteration"

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if steps < self.noisiest_steps:
            raise ValueError(
                f"rollout.steps ({steps}) must be at least {self.noisiest_steps} for algorithm.noisiest_steps"
            )


@dataclass(frozen=True)
class _Frozen:
    """What is measured of a micro-batch without gradient: the old policy's error, (n,), and the base's velocity."""

    old_error: Tensor
    base_velocity: Tensor | None


class CRD(GroupAlgorithm[CRDConfig, _Frozen]):
    """Two copies trail the policy: one that it is compared with, and one that samples."""

    Config = CRDConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of (5 / beta) (beta (rho - mean rho) - (r - mean r))^2 + the anchor; mean "
            "over the updates.",
            "Falls inside an iteration of several updates, and begins anew with the next, as the old policy moves.",
        ),
        KL,
        GROUP_PASS,
        GROWTH,
    )
    SUMMARY = 1

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sampler_weights = self.policy.copy_weights()

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, CRDConfig)
        base = guided_passes(algorithm.reference_guidance) if algorithm.anchor_weight > 0 else 0
        passes = 4 + base + needs_group_pass(config)
        return forward_cost(config, algorithm.timesteps, passes, copies=2)

    @property
    def rollout_weights(self) -> Mapping[str, Tensor] | None:
        return self.sampler_weights

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        return stratified_steps(rollout.sigmas, self.config.timesteps, self.config.noisiest_steps, random)

    def totals(self, device: torch.device) -> Totals:
        growth = ("velocity_growth",) if self.config.anchor_weight > 0 else ()
        return Totals(device, "loss", "kl", *growth)

    @torch.no_grad()
    def frozen(self, noised: Noised, rows: Tensor) -> _Frozen:
        base = None
        with self.policy.with_weights(self.old_weights):
            old_error = normalized_error(noised.predict(self.policy, rows), noised.target[rows], 1.0)
        if self.config.anchor_weight > 0:
            with self.policy.as_reference():
                base = noised.predict(self.policy, rows, self.config.reference_guidance)
        return _Frozen(old_error, base)

    def summary(self, predicted: Tensor, target: Tensor, frozen: _Frozen) -> Tensor:
        return implied_reward(predicted, target, frozen.old_error)[:, None]

    def group_number(self, summary: Tensor, advantages: Tensor) -> Tensor:
        return group_offset(summary[0], reward_of(advantages), self.config.beta)

    def loss(
        self,
        predicted: Tensor,
        target: Tensor,
        frozen: _Frozen,
        numbers: Tensor,
        advantages: Tensor,
        totals: Totals,
    ) -> Tensor:
        config, rewards = self.config, reward_of(advantages)
        loss = crd_loss(implied_reward(predicted, target, frozen.old_error), rewards, numbers, config.beta).sum()
        if frozen.base_velocity is not None:
            distance = matching_error(predicted, frozen.base_velocity)
            loss = loss + (anchor_weight(rewards, config.anchor_weight) * distance).sum()
            totals.add("kl", distance.detach().sum())
            totals.add("velocity_growth", (log_norm(predicted) - log_norm(frozen.base_velocity)).sum())
        totals.add("loss", loss.detach())
        return loss

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"old": self.old_weights, "sampler": self.sampler_weights}

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Move both copies: copy <- mu copy + (1 - mu) policy, mu rising with the optimizer steps done."""
        config = self.config
        self.move_old(min(config.old_limit, config.old_start + config.old_rate * steps))
        keep = min(config.sampler_limit, config.sampler_rate * max(0, steps - config.sampler_after))
        move_towards(self.sampler_weights, self.policy.parameters, keep)
