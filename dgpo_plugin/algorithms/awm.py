"""Advantage Weighted Matching, AWM (arXiv 2509.25050): matching errors as likelihoods, weighted with advantages.

It follows the released code (scxue/advantage_weighted_matching be51372, scripts/train_sd3_awm.py), which is not its
paper:
1. The likelihood is a root of the matching error (``likelihood: root``); the paper's is the error (``uniform``).
2. Advantages are clipped to +-5 and divided by 5; their spread is the iteration's (``advantage_std``).
3. A second anchor, of weight 1, holds the policy to its old copy (``old_weight``).
And it differs from that code:
4. The six flow times are one set an iteration, there one for every three images; the noise is each image's own in both.
5. The matching error is in the type of the latents, there in float64.
6. The ratio's clip to [0, 2] is left out: with one update a rollout the ratio is exactly 1.
7. The rollout's first step from sigma = 1 is the limit of the solver's, there the grid begins at .999. Its last noise
   level is half of the one before it in both (:func:`sampled_at`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random
from dgpo_plugin.algorithms.flow_times import FlowTime, one_of_each, strata
from dgpo_plugin.algorithms.forward import (
    KL,
    ForwardAlgorithm,
    ForwardConfig,
    Seen,
    forward_cost,
    matching_error,
)
from dgpo_plugin.algorithms.rollout import Batch, Rollout
from dgpo_plugin.config.fields import AdvantageStd, RunConfig, Schedule
from dgpo_plugin.samplers.ode import Velocity
from dgpo_plugin.samplers.sa_solver import sample_sa_solver

Likelihood = Literal["root", "uniform", "sigma", "sigma_squared"]
POWER, SMALL = 0.25, 1e-10
NOISY_FROM, NOISY_TO = 0.3, 0.9
"""The sigmas between which the rollout's steps end that draw noise."""


def log_likelihood(error: Tensor, sigma: float | Tensor, kind: Likelihood) -> Tensor:
    """What stands for the log-probability of each image, (N,), from its matching error (N,).

    ``root`` is -(sigma / p) ((d + 1e-10)^p - (1e-10)^p) with p = 1/4 (there ``ghuber``), whose slope grows where d is
    small; ``uniform`` is -d, ``sigma`` -sigma d, ``sigma_squared`` -sigma^2 d.
    """
    if kind == "root":
        likelihood: Tensor = -(sigma / POWER) * ((error + SMALL).pow(POWER) - SMALL**POWER)
        return likelihood
    return -error * {"uniform": 1.0, "sigma": sigma, "sigma_squared": sigma**2}[kind]


def awm_loss(likelihood: Tensor, advantages: Tensor) -> Tensor:
    """-(A / 5) exp(l - l) for each image, (N,), where the second l is without gradient: so -(A / 5) times l's slope."""
    return -(advantages / 5) * torch.exp(likelihood - likelihood.detach())


def sampled_at(sigmas: Sequence[float]) -> list[float]:
    """The rollout's noise levels: a schedule's, of which the last above 0 is replaced by half of the one before it.

    As in the released code (flow_grpo/diffusers_patch/sd3_pipeline_with_logprob.py). The pipeline's own last one, .0089
    after .2062 in 14 steps at shift 3, is too far from there in log((1 - sigma) / sigma) for a solver that goes on
    along a slope. What is trained on are the schedule's in both.

    Args:
        sigmas: steps + 1 falling values, 3 at least, the last 0.
    """
    return [*sigmas[:-2], sigmas[-3] / 2, sigmas[-1]]


class AWMConfig(ForwardConfig):
    """AWM; the defaults are its GenEval setting."""

    name: Literal["awm"] = "awm"
    likelihood: Likelihood = Field(
        "root", description="What stands for the log-probability: a root of the matching error, or -d, weighted."
    )
    noise: float = Field(
        0.4,
        ge=0,
        description="tau of the rollout's SA-Solver in steps that end between sigma .3 and .9; 0 everywhere is an ODE.",
    )
    kl_weight: float = Field(
        1e-3,
        ge=0,
        description="Weight of the squared distance between the policy's and the frozen base's velocity; .003 (OCR), "
        "1e-4 (PickScore).",
    )
    old_weight: float = Field(1.0, ge=0, description="Likewise of that from the old policy's.")
    timesteps: int = Field(6, ge=1, description="Sampler steps trained on in an iteration, one of as many runs.")
    first_step: int = Field(1, ge=0, description="The first step of the first run, from 0; 0 (PickScore).")
    last_step: int = Field(11, ge=0, description="The last step of the last run.")
    advantage_std: AdvantageStd = "iteration"

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if steps <= self.last_step:
            raise ValueError(f"rollout.steps ({steps}) must be more than algorithm.last_step ({self.last_step})")

    @model_validator(mode="after")
    def _runs_fit(self) -> AWMConfig:
        if self.last_step - self.first_step + 1 < self.timesteps:
            raise ValueError(
                f"timesteps ({self.timesteps}) cannot exceed the steps from first_step ({self.first_step}) to "
                f"last_step ({self.last_step})"
            )
        return self


class AWM(ForwardAlgorithm[AWMConfig]):
    """The rollout is the policy's own; the old copy is an anchor."""

    Config = AWMConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of -A / 5 + kl_weight kl + old_weight times the squared distance from the "
            "old policy's velocity; mean over the updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        KL,
        GROWTH,
    )

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, AWMConfig)
        passes = 3 + (algorithm.kl_weight > 0) + (algorithm.old_weight > 0)
        return forward_cost(config, algorithm.timesteps, passes)

    @property
    def base_guidance(self) -> float | None:
        return 1.0 if self.config.kl_weight > 0 else None

    @property
    def looks_at_old(self) -> bool:
        return self.config.old_weight > 0

    @property
    def trained_times(self) -> int:
        return self.config.timesteps

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        config = self.config
        return one_of_each(rollout.sigmas, strata(config.first_step, config.last_step, config.timesteps), random)

    def integrate(self, velocity: Velocity, noise: Tensor, batch: Batch, random: Random) -> Tensor:
        def fresh(step: int) -> Tensor:
            shape = self.policy.model.latent_shape
            return random.sample_noise(shape, batch.sample_ids, batch.layout, "step noise", step).to(noise.device)

        def tau(sigma: float) -> float:
            return self.config.noise if NOISY_FROM <= sigma <= NOISY_TO else 0.0

        return sample_sa_solver(velocity, noise, sampled_at(batch.sigmas), tau, fresh)

    def losses(self, seen: Seen, advantages: Tensor) -> Tensor:
        config = self.config
        likelihood = log_likelihood(matching_error(seen.predicted, seen.target), seen.sigma, config.likelihood)
        losses = awm_loss(likelihood, advantages)
        if seen.base is not None:
            losses = losses + config.kl_weight * matching_error(seen.predicted, seen.base)
        if seen.old is not None:
            losses = losses + config.old_weight * matching_error(seen.predicted, seen.old)
        return losses

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Move the old policy: old <- mu old + (1 - mu) policy, mu = min(.3, .001 steps)."""
        self.move_old(min(0.3, 0.001 * steps))
