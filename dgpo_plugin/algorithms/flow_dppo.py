"""Flow-DPPO (arXiv 2606.11025): no ratio is clipped; a step that went too far from the old policy gives no gradient.

It follows the authors' code in UniRL (0c97cfb, flowdppo.py) and in Flow-Factory (examples/dppo/lora/sd3_5):
1. The divergence is a mean over dims, the paper's a sum: its delta is this threshold times the dims.
2. The two repositories name thresholds ten times apart, 1e-5 (Flow-SDE steps) and 1e-6 (CPS steps): ``threshold``.
3. The stochastic steps are any of the noisiest, drawn anew each iteration; they need not follow each other, as in
   Flow-GRPO-Fast's window.
4. In an iteration's first update the old policy is the policy, and nothing is dropped.
5. The old policy's means are kept from the rollout, there computed again before the updates.
6. The KL term of ``kl_of: step`` is Flow-GRPO's, without the step's length; UniRL's is the Gaussians' own.
7. Log-probabilities, zero advantages and the advantages' limit are as in Flow-GRPO here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import Random
from dgpo_plugin.algorithms.trajectories import (
    Guidance,
    KLWeight,
    Taken,
    Trajectories,
    TrajectoryConfig,
    check_window,
)
from dgpo_plugin.config.fields import Schedule
from dgpo_plugin.samplers.sde import (
    SdeSampler,
    SdeStep,
    cps_log_probability,
    cps_step,
    flow_sde_log_probability,
    flow_sde_step,
)


def outside(ratio: Tensor, divergence: Tensor, advantages: Tensor, threshold: float) -> Tensor:
    """Which steps give no gradient, boolean, (N,): too far from the old policy, and on the way that they would go on.

    The divergence has reached the threshold, and the ratio is above 1 with A > 0 or below 1 with A < 0.
    """
    onwards = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    return (divergence >= threshold) & onwards


def dppo_loss(ratio: Tensor, advantages: Tensor, out: Tensor) -> Tensor:
    """-A ratio for each image, (N,), and 0 for those outside."""
    return (-advantages * ratio).masked_fill(out, 0.0)


class FlowDPPOConfig(TrajectoryConfig):
    """Flow-DPPO; the defaults are UniRL's recipe."""

    name: Literal["flow-dppo"] = "flow-dppo"
    sampler: SdeSampler = Field("flow-sde", description="How the stochastic steps are drawn.")
    noise_level: float = Field(0.7, gt=0, description="Noise level a of the stochastic steps; below 1 for cps.")
    threshold: float = Field(
        1e-5,
        gt=0,
        description="Mean over dims of (mean - old mean)^2 / (2 std^2) from which a step gives no gradient if it would "
        "go further: 1e-5, or 1e-6 with cps.",
    )
    kl_weight: KLWeight = 0.0
    kl_of: Literal["step", "clean"] = Field(
        "step", description="What the KL term compares: the steps' means over 2 sd^2, or the clean predictions."
    )
    guidance: Guidance = 1.0
    window: int = Field(3, ge=1, description="Stochastic steps, the only ones trained.")
    window_range: int = Field(5, ge=1, description="Steps, the noisiest, that they are drawn from; 6 with cps.")

    def trained_steps(self, steps: int) -> int:
        return self.window

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        check_window(self.window_range, steps)
        if schedule == "dpm" and self.sampler == "flow-sde":
            raise ValueError("rollout.schedule dpm: is for deterministic samplers; leave it out for flow-sde steps")

    @model_validator(mode="after")
    def _fits(self) -> FlowDPPOConfig:
        if self.window > self.window_range:
            raise ValueError(f"window ({self.window}) cannot exceed window_range ({self.window_range})")
        if self.sampler == "cps" and self.noise_level >= 1:
            raise ValueError(f"noise_level ({self.noise_level}) must be below 1 for sampler: cps")
        return self


class FlowDPPO(Trajectories[FlowDPPOConfig]):
    """A few stochastic steps, whose means are kept."""

    Config = FlowDPPOConfig
    KEEPS_MEANS = True

    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        drawn = random.choose(self.config.window, self.config.window_range, "window")
        return drawn, drawn

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        ends, level = (sigmas[step], sigmas[step + 1]), self.config.noise_level
        if self.config.sampler == "cps":
            return cps_step(x, velocity, *ends, level)
        return flow_sde_step(x, velocity, *ends, level, sigmas[1])

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        of_sampler = cps_log_probability if self.config.sampler == "cps" else flow_sde_log_probability
        return of_sampler(x_next, gaussian)

    def _step_loss(self, taken: Taken) -> tuple[Tensor, Tensor, Tensor]:
        assert taken.old_mean is not None
        ratio = torch.exp(taken.log_probability - taken.old_log_probability)
        gone = (taken.gaussian.mean.detach() - taken.old_mean).square().flatten(1).mean(1)
        divergence = gone / (2 * taken.gaussian.std**2)
        out = outside(ratio.detach(), divergence, taken.advantages, self.config.threshold)
        return dppo_loss(ratio, taken.advantages, out), ratio, out

    def _divergence(self, gaussian: SdeStep, base: SdeStep, clean: Tensor, base_clean: Tensor) -> Tensor:
        if self.config.kl_of == "clean":
            return (clean - base_clean).square().flatten(1).mean(1)
        return super()._divergence(gaussian, base, clean, base_clean)
