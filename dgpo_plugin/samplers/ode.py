"""Deterministic samplers for flow matching: Euler and DPM-Solver++ (2M).

Flow convention (docs/architecture.md, section 3): x_sigma = (1 - sigma) x0 + sigma noise, velocity = noise - x0. A
schedule is a falling sequence of sigmas that starts at most at 1 and ends at 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor

from dgpo_plugin.config.fields import OdeSampler

Velocity = Callable[[Tensor, float], Tensor]
"""(latents (N, ...), sigma) -> velocity (N, ...)."""


def dpm_flow_sigmas(steps: int, shift: float) -> list[float]:
    """The noise levels of diffusers' DPMSolverMultistepScheduler for flows, steps + 1 falling values, the last 0.

    u_i = 0.999 (1 - i / steps), sigma_i = shift u_i / (1 + (shift - 1) u_i). No step is then much longer in
    log((1 - sigma) / sigma) than the one before it, over which a multistep solver extrapolates.
    """
    even = [0.999 * (1 - step / steps) for step in range(steps)]
    return [shift * u / (1 + (shift - 1) * u) for u in even] + [0.0]


def shifted_levels(shift: float, count: int = 1000) -> list[float]:
    """The noise levels that flows are trained on, falling: u = 1, 1 - 1 / count, .., 1 / count, shifted as above.

    They are ``sigmas`` of diffusers' FlowMatchEulerDiscreteScheduler as its constructor leaves it.
    """
    even = [1 - number / count for number in range(count)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step: x' = x + (sigma' - sigma) v, (N, ...)."""
    return x + (sigma_next - sigma) * velocity


def dpm_solver_pp_2m_step(
    x: Tensor,
    clean: Tensor,
    previous_clean: Tensor | None,
    sigma: float,
    sigma_next: float,
    sigma_previous: float | None,
) -> Tensor:
    """One step of DPM-Solver++ (2M), arXiv 2211.01095 algorithm 2, in the flow schedule alpha = 1 - sigma.

    With lambda = log((1 - sigma) / sigma) and h = lambda' - lambda:
    x' = (sigma' / sigma) x - (1 - sigma') (exp(-h) - 1) D, where D extrapolates the clean prediction linearly in
    lambda from the two last ones. It is first order (D = clean) without a past, after a past at sigma = 1 (whose
    lambda is infinitely far away) and on the step to sigma' = 0.

    Args:
        x: noisy latents at ``sigma``, (N, ...).
        clean: the clean prediction there, x - sigma v.
        previous_clean, sigma_previous: the clean prediction of the step before and its sigma; None on the first step.

    Returns:
        Noisy latents at ``sigma_next``, (N, ...).
    """
    if sigma_next == 0:
        return clean
    direction = clean
    if previous_clean is not None and sigma_previous is not None and sigma_previous < 1:
        ratio = (_log_snr(sigma) - _log_snr(sigma_previous)) / (_log_snr(sigma_next) - _log_snr(sigma))
        direction = clean + (clean - previous_clean) / (2 * ratio)
    # (1 - sigma') exp(-h) = (1 - sigma) sigma' / sigma, finite at sigma = 1 too.
    shrink = (1 - sigma) * sigma_next / sigma - (1 - sigma_next)
    return (sigma_next / sigma) * x - shrink * direction


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def sample_ode(velocity: Velocity, noise: Tensor, sigmas: list[float], sampler: OdeSampler) -> Tensor:
    """Integrate a velocity from noise to clean latents, (N, ...).

    Args:
        velocity: the (guided) velocity; called once a step.
        noise: (N, ...), at ``sigmas[0]``.
        sigmas: steps + 1 falling values, the last 0.
    """
    x, previous_clean, sigma_previous = noise, None, None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        predicted = velocity(x, sigma)
        if sampler == "euler":
            x = euler_step(x, predicted, sigma, sigma_next)
            continue
        clean = x - sigma * predicted
        x = dpm_solver_pp_2m_step(x, clean, previous_clean, sigma, sigma_next, sigma_previous)
        previous_clean, sigma_previous = clean, sigma
    return x
