"""Reinforce Adjoint Matching, RAM (arXiv 2605.10759): a regression on the base's velocity, bent by the reward.

It follows what others read of the released code (AndreasBergmeister/ram, which we have not seen ourselves):
1. The bent velocity has the old policy's error where the paper's equation 17 has the current one's (``bend_with``).
2. Advantages are clipped to +-5, there not; their spread is the iteration's (``advantage_std``).
3. The flow times are drawn for each prompt group, there for each image; the noise is each image's own in both.
4. Guidance and number of steps of the rollout, and the adapter's rank, are not known to us.
The authors call the loss exact to first order in the reward, and biased beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random
from dgpo_plugin.algorithms.flow_times import FlowTime, noisy_times
from dgpo_plugin.algorithms.forward import (
    KL,
    ForwardAlgorithm,
    OdeForwardConfig,
    Seen,
    forward_cost,
    matching_error,
)
from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.config.fields import AdvantageStd, OdeSampler, RunConfig


def ram_loss(
    predicted: Tensor, bend: Tensor, base: Tensor, target: Tensor, advantages: Tensor, multiplier: float
) -> Tensor:
    """mean over dims of (v - [v_base + m A (target - v_bend)])^2 for each image, (N,); the bracket is without gradient.

    Args:
        predicted, bend, base, target: velocities, (N, ...).
        advantages: (N,).
        multiplier: m.
    """
    pull = (multiplier * advantages).view(-1, *[1] * (target.dim() - 1))
    return matching_error(predicted, (base + pull * (target - bend)).detach())


class RAMConfig(OdeForwardConfig):
    """RAM; the defaults are its GenEval and OCR setting, as far as it is known."""

    name: Literal["ram"] = "ram"
    sampler: OdeSampler = Field("euler", description="Deterministic sampler of the rollout.")
    rollout_guidance: float = Field(4.5, ge=1, description="Classifier-free guidance of the rollout; 1 is none.")
    multiplier: float = Field(
        100.0, gt=0, description="m, how far an advantage of 1 bends the base's velocity; 1000 with PickScore."
    )
    bend_with: Literal["old_policy", "policy"] = Field(
        "old_policy", description="Whose error bends it: the old policy's (code), or the policy's own (paper)."
    )
    timesteps: int = Field(8, ge=1, description="Flow times of each prompt group, drawn with the density 2 sigma.")
    advantage_std: AdvantageStd = "iteration"


class RAM(ForwardAlgorithm[RAMConfig]):
    """The frozen base is always looked at: the policy is regressed on it."""

    Config = RAMConfig
    METRICS = (
        Metric(
            "loss",
            "velocity squared",
            "Mean over images and flow times of |v - (v_base + m A (target - v_old))|^2; mean over the updates.",
            "Large, and falling little: most of it is (m A)^2 times the matching error, which cannot be learned away.",
        ),
        KL,
        GROWTH,
    )

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, RAMConfig)
        return forward_cost(config, algorithm.timesteps, 5 if algorithm.bend_with == "old_policy" else 4)

    @property
    def rollout_weights(self) -> Mapping[str, Tensor] | None:
        return self.old_weights

    @property
    def looks_at_old(self) -> bool:
        return self.config.bend_with == "old_policy"

    @property
    def trained_times(self) -> int:
        return self.config.timesteps

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        return noisy_times(rollout.sample_ids, rollout.layout, self.config.timesteps, random)

    def losses(self, seen: Seen, advantages: Tensor) -> Tensor:
        assert seen.base is not None
        bend = seen.predicted if seen.old is None else seen.old
        return ram_loss(seen.predicted, bend, seen.base, seen.target, advantages, self.config.multiplier)

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Move the old policy: old <- mu old + (1 - mu) policy, mu = min(.9, .01 i) after iteration i, from 1."""
        self.move_old(min(0.9, 0.01 * (iteration + 1)))
