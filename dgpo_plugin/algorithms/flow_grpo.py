"""Flow-GRPO (arXiv 2505.05470) and Flow-GRPO-Fast: policy gradients through stochastic sampler steps.

The loss first, as a pure function on tensors; then their configurations and classes: the full one, and a window of CPS
steps inside a deterministic rollout. With ``window_every`` that window moves from the noisiest steps on, which is
MixGRPO's order (arXiv 2507.21802; from others' notes, its own steps are another SDE's).

It follows the authors' released code, and differs from the paper, from that code too where it says so:
1. Log-probabilities are means over dims, not sums, so that a clip means the same at every size.
2. The KL term is the means' squared distance, a mean over dims, over 2 sd^2: without the step's length.
3. Advantages are clipped to +-5; their spread is the iteration's (``advantage_std``).
4. The last step is stochastic and not trained.
5. All images of advantage 0 are dropped; the code keeps some by chance, so that its batches come out even.
6. In an iteration's first update the ratio is 1 exactly; the code compares with the rollout's pass, which rounds apart.
7. Fast takes CPS steps (arXiv 2509.05952) in its window.
8. With ``keep_graphs`` the trained steps are not computed again, as in LeanGRPO; the gradient is the same.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

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
    SdeStep,
    cps_log_probability,
    cps_step,
    flow_sde_log_probability,
    flow_sde_step,
)


def policy_loss(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) for each image, (N,)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


Clip = Annotated[float, Field(gt=0, description="Half-width of the clipped probability ratio.")]


class RatioConfig(TrajectoryConfig):
    """What those are told whose ratio is clipped."""

    clip: Clip


class FlowSDEConfig(RatioConfig):
    """What those are told of which every step is stochastic, and all but the last are trained."""

    noise_level: float = Field(0.7, gt=0, description="Noise level a of the Flow-SDE steps.")
    clip: Clip = 1e-4
    kl_weight: KLWeight = 0.04
    guidance: Guidance = 4.5

    def trained_steps(self, steps: int) -> int:
        return steps - 1

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if schedule == "dpm":
            # The SDE's noise grows without bound towards sigma = 1, which only the native grid starts at exactly.
            raise ValueError(f"rollout.schedule dpm: is for deterministic samplers; leave it out for {self.name}")


class FlowGRPOConfig(FlowSDEConfig):
    """Flow-GRPO: every step is stochastic, all but the last are trained."""

    name: Literal["flow-grpo"] = "flow-grpo"


class FlowGRPOFastConfig(RatioConfig):
    """Flow-GRPO-Fast: deterministic steps, but for a random window of stochastic CPS steps, the only ones trained."""

    name: Literal["flow-grpo-fast"] = "flow-grpo-fast"
    noise_level: float = Field(0.8, gt=0, lt=1, description="Noise level a of the CPS steps.")
    clip: Clip = 1e-5
    kl_weight: KLWeight = 0.0
    guidance: Guidance = 1.0
    window: int = Field(
        3, ge=1, description="Stochastic steps; 3 in both published settings without guidance, 2 in the one with 4.5."
    )
    window_range: int = Field(5, ge=1, description="Steps, the noisiest, within which the window lies.")
    window_every: int | None = Field(
        None,
        ge=1,
        description="Iterations after which the window moves on by a step, from the noisiest ones to the end of "
        "window_range and then anew (MixGRPO: 25); null draws it afresh in each.",
    )

    def trained_steps(self, steps: int) -> int:
        return self.window

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        check_window(self.window_range, steps)

    @model_validator(mode="after")
    def _window_fits(self) -> FlowGRPOFastConfig:
        if self.window > self.window_range:
            raise ValueError(f"window ({self.window}) cannot exceed window_range ({self.window_range})")
        return self


T = TypeVar("T", bound=RatioConfig)


class _Clipped(Trajectories[T]):
    """The probability ratio is clipped."""

    def _step_loss(self, taken: Taken) -> tuple[Tensor, Tensor, Tensor]:
        ratio, clip = torch.exp(taken.log_probability - taken.old_log_probability), self.config.clip
        return policy_loss(ratio, taken.advantages, clip), ratio, (ratio.detach() - 1).abs() > clip


S = TypeVar("S", bound=FlowSDEConfig)


class FlowSDESteps(_Clipped[S]):
    """Every step is a Flow-SDE step."""

    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        # The last step's noise is too small to be trained on.
        return list(range(steps)), list(range(steps - 1))

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        return flow_sde_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level, sigmas[1])

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        return flow_sde_log_probability(x_next, gaussian)


class FlowGRPO(FlowSDESteps[FlowGRPOConfig]):
    """Every step is a Flow-SDE step, with a plain ratio."""

    Config = FlowGRPOConfig


class FlowGRPOFast(_Clipped[FlowGRPOFastConfig]):
    """A window of CPS steps, drawn anew each iteration, or moving."""

    Config = FlowGRPOFastConfig

    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        config, places = self.config, self.config.window_range - self.config.window + 1
        if config.window_every is None:
            first = random.choose(1, places, "window")[0]
        else:
            first = random.iteration // config.window_every % places
        window = list(range(first, first + config.window))
        return window, window

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        return cps_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level)

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        return cps_log_probability(x_next, gaussian)
