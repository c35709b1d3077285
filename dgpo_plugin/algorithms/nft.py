"""DiffusionNFT (arXiv 2509.16117): the policy is pulled to good pictures, its mirror image in the old policy to bad.

It follows the released code (NVlabs/DiffusionNFT 24af555, scripts/train_nft_sd3.py), which is not all of the paper:
1. The reward r in [0, 1] is made of advantages clipped to +-5, (A + 5) / 10; the paper clips (R - mean) / Z to +-1.
2. The spread of the rewards is the iteration's (``advantage_std``).
3. A KL term holds the policy to the frozen base (``kl_weight``, there ``train.beta``; ``mix`` is there ``beta``).
4. The old policy moves once an iteration, by the optimizer steps done by then.
And it differs from that code:
5. Errors are the velocity's, which is the same loss (sigma times the velocity's error is the clean picture's).
6. The mean of the absolute error is computed in the type of the latents, there in float64.
7. An iteration's several updates (OCR's two) have prompt groups of their own, there images shuffled over all groups.
8. The denoiser is told the flow time as it is, there in the rollout cut off to a thousandth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random
from dgpo_plugin.algorithms.flow_times import FlowTime, everywhere, own_steps
from dgpo_plugin.algorithms.forward import (
    KL,
    ForwardAlgorithm,
    OdeForwardConfig,
    Seen,
    forward_cost,
    matching_error,
    normalized_error,
)
from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.config.fields import AdvantageStd, RunConfig, Schedule

SCALE = 5.0
"""The advantages' limit, by which the released loss is multiplied."""


def optimality(advantages: Tensor) -> Tensor:
    """r in [0, 1]: (A + 5) / 10, 1/2 for a picture that is as good as its group."""
    return (advantages / (2 * SCALE) + 0.5).clamp(0, 1)


def nft_loss(
    predicted: Tensor, old: Tensor, target: Tensor, advantages: Tensor, mix: float, sigma: float | Tensor
) -> Tensor:
    """5 (r l+ + (1 - r) l-) / mix for each image, (N,).

    l+ is the error of mix v + (1 - mix) v_old, l- that of (1 + mix) v_old - mix v, each over its own size
    (:func:`~dgpo_plugin.algorithms.forward.normalized_error`).

    Args:
        predicted, old, target: velocities, (N, ...); gradient flows through the first.
        advantages: (N,).
    """
    good = normalized_error(mix * predicted + (1 - mix) * old, target, sigma)
    bad = normalized_error((1 + mix) * old - mix * predicted, target, sigma)
    r = optimality(advantages)
    return SCALE * (r * good + (1 - r) * bad) / mix


class NFTConfig(OdeForwardConfig):
    """DiffusionNFT; the defaults are its GenEval setting."""

    name: Literal["nft"] = "nft"
    mix: float = Field(
        1.0, gt=0, description="How far the policy stands for the difference from the old one; 1, or .1 (OCR, several)."
    )
    kl_weight: float = Field(
        1e-4, ge=0, description="Weight of the squared distance between the policy's and the frozen base's velocity."
    )
    timesteps: int = Field(
        9, ge=1, description="Sampler steps that each image is trained on, drawn for each by itself."
    )
    old_after: int = Field(
        0,
        ge=0,
        description="Optimizer steps until which the old policy is the policy as the iteration began; 75 (OCR).",
    )
    old_rate: float = Field(
        0.001, ge=0, description="What the old policy's share rises by with each step from then on; .0075 (OCR)."
    )
    old_limit: float = Field(0.5, ge=0, lt=1, description="What that share ends at; .999 (OCR).")
    advantage_std: AdvantageStd = "iteration"

    @property
    def default_schedule(self) -> Schedule:
        """The pipeline's own noise levels, as published, which are long at the end for a solver of two steps."""
        return "native"

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if steps < self.timesteps:
            raise ValueError(f"rollout.steps ({steps}) must be at least {self.timesteps} for algorithm.timesteps")


class NFT(ForwardAlgorithm[NFTConfig]):
    """Each image at sampler steps of its own, with noise of its own."""

    Config = NFTConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of 5 (r l+ + (1 - r) l-) / mix + kl_weight kl; mean over the updates.",
            "Without a trend of its own: its size is that of the errors, which the pictures set.",
        ),
        KL,
        GROWTH,
    )

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, NFTConfig)
        return forward_cost(config, algorithm.timesteps, 4 + (algorithm.kl_weight > 0))

    @property
    def base_guidance(self) -> float | None:
        return 1.0 if self.config.kl_weight > 0 else None

    @property
    def rollout_weights(self) -> Mapping[str, Tensor] | None:
        return self.old_weights

    @property
    def trained_times(self) -> int:
        return self.config.timesteps

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        times = own_steps(rollout.sigmas, rollout.sample_ids, rollout.layout, self.config.timesteps, random)
        return [everywhere(time, len(rollout.sample_ids)) for time in times] if self.processes.lockstep else times

    def losses(self, seen: Seen, advantages: Tensor) -> Tensor:
        assert seen.old is not None
        losses = nft_loss(seen.predicted, seen.old, seen.target, advantages, self.config.mix, seen.sigma)
        if seen.base is not None:
            losses = losses + self.config.kl_weight * matching_error(seen.predicted, seen.base)
        return losses

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Move the old policy: old <- mu old + (1 - mu) policy, mu = min(limit, rate (steps - after))."""
        config = self.config
        self.move_old(min(config.old_limit, config.old_rate * max(0, steps - config.old_after)))
