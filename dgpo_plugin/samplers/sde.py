"""Stochastic samplers with log-probabilities, for policy gradients: Flow-SDE and CPS (docs/architecture.md, section 4).

Both keep the flow's marginals while adding noise at every step, so that a step is a Gaussian whose log-probability
can be differentiated through its mean. Log-probabilities are means over all but the batch axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

SdeSampler = Literal["flow-sde", "cps"]

ALMOST_ONE = 0.998
"""Sigmas from here on count as 1 where 1 - sigma divides: some schedules (zero-terminal-SNR U-Nets', Sana's) start at
0.9998 or 0.9997 instead, and a diffusion of sqrt(4,000) a would throw the picture far out of the flow in one step."""


@dataclass(frozen=True)
class SdeStep:
    """The Gaussian that one stochastic step draws from.

    Attributes:
        mean: (N, ...), differentiable in the velocity.
        std: standard deviation of the step's noise.
        diffusion: sd of the paper, whose square scales the KL term; equals ``std`` for CPS.
    """

    mean: Tensor
    std: float
    diffusion: float


def flow_sde_step(
    x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise_level: float, sigma_after_one: float
) -> SdeStep:
    """Flow-GRPO's SDE step (arXiv 2505.05470, equation 9) in float32 or better.

    sd = a sqrt(s / (1 - s)); mean = x (1 + sd^2 / (2 s) dt) + v (1 + sd^2 (1 - s) / (2 s)) dt; std = sd sqrt(-dt).

    Args:
        x: (N, ...) at ``sigma``; the type is raised to at least float32.
        noise_level: a.
        sigma_after_one: stands for s in the denominator 1 - s at s = 1, or almost (the schedule's second sigma).
    """
    x, velocity = _at_least_float32(x), _at_least_float32(velocity)
    step = sigma_next - sigma
    diffusion = noise_level * math.sqrt(sigma / (1 - (sigma_after_one if sigma >= ALMOST_ONE else sigma)))
    mean = x * (1 + diffusion**2 / (2 * sigma) * step)
    mean = mean + velocity * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * step
    return SdeStep(mean, diffusion * math.sqrt(-step), diffusion)


def cps_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise_level: float) -> SdeStep:
    """Coefficients-preserving sampling: exactly the schedule's noise at every step, part of it drawn afresh.

    k = s' sin(a pi / 2); mean = (1 - s') x0 + sqrt(s'^2 - k^2) x1 with x0 = x - s v and x1 = x + (1 - s) v.
    """
    x, velocity = _at_least_float32(x), _at_least_float32(velocity)
    fresh = sigma_next * math.sin(noise_level * math.pi / 2)
    clean, noise = x - sigma * velocity, x + (1 - sigma) * velocity
    mean = (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - fresh**2) * noise
    return SdeStep(mean, fresh, fresh)


def flow_sde_log_probability(x_next: Tensor, step: SdeStep) -> Tensor:
    """The mean Gaussian log-density of a step, (N,): -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2."""
    exponent = -((_at_least_float32(x_next) - step.mean) ** 2) / (2 * step.std**2)
    return exponent.flatten(1).mean(1) - math.log(step.std) - 0.5 * math.log(2 * math.pi)


def cps_log_probability(x_next: Tensor, step: SdeStep) -> Tensor:
    """How likely a CPS step went there, (N,): -mean (x' - mean)^2, without the variance, which no policy changes."""
    return -((_at_least_float32(x_next) - step.mean) ** 2).flatten(1).mean(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x
