"""SA-Solver (arXiv 2309.05019), a stochastic multistep sampler for flow matching: predictor and corrector of order 2.

One evaluation a step (PEC): the clean picture at the predicted point corrects that point and feeds the next predictor.
The flow convention is that of :mod:`~dgpo_plugin.samplers.ode`; lambda = log((1 - sigma) / sigma).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.samplers.ode import Velocity


@dataclass(frozen=True)
class SaStep:
    """The coefficients of one step from sigma to sigma' > 0, whose tau is constant in it.

    x' = keep x + clean D + slope dD/dlambda + noise z: the clean prediction D at sigma, its slope in lambda, z standard
    normal. With kappa = 1 + tau^2 and h = lambda' - lambda:
    keep = (sigma' / sigma) exp(-tau^2 h), clean = (1 - sigma') (1 - exp(-kappa h)), slope = (1 - sigma') kappa h^2 / 2,
    noise = sigma' sqrt(1 - exp(-2 tau^2 h)). The slope's h^2 / 2 stands for the integral of exp(-kappa (lambda' - l))
    (l - lambda) times kappa, to third order in h, as in the authors' version for few steps (``..._few_steps`` in
    scxue/advantage_weighted_matching, diffusers_patch/sa_solver.py; their DPM-Solver++ (2M) at tau = 0).

    Attributes:
        keep, clean, slope, noise: as above.
        length: h; infinite from sigma = 1 on, and then there is no slope.
    """

    keep: float
    clean: float
    slope: float
    noise: float
    length: float


def sa_step(sigma: float, sigma_next: float, tau: float) -> SaStep:
    """The coefficients of a step, for 1 >= sigma > sigma' > 0."""
    alpha, kappa = 1 - sigma_next, 1 + tau**2
    if sigma >= 1:  # everything but the noise's share is new; with tau > 0 nothing of the old noise is left
        return SaStep(0.0 if tau else sigma_next / sigma, alpha, 0.0, sigma_next if tau else 0.0, math.inf)
    h = math.log((1 - sigma_next) / sigma_next) - math.log((1 - sigma) / sigma)
    return SaStep(
        keep=sigma_next / sigma * math.exp(-(tau**2) * h),
        clean=-alpha * math.expm1(-kappa * h),
        slope=alpha * kappa * h**2 / 2,
        noise=sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h)),
        length=h,
    )


def sample_sa_solver(
    velocity: Velocity,
    noise: Tensor,
    sigmas: list[float],
    tau: Callable[[float], float],
    fresh: Callable[[int], Tensor],
) -> Tensor:
    """From noise to clean latents, (N, ...); the last step gives the clean prediction before it.

    Args:
        velocity: the (guided) velocity; called once a step.
        noise: (N, ...), at ``sigmas[0]``.
        sigmas: steps + 1 falling values, the last 0.
        tau: how stochastic the step is that ends at a sigma; 0 is the ODE, 1 the SDE.
        fresh: standard normal noise for a step, (N, ...), asked for where tau is not 0.
    """
    x = noise
    clean = x - sigmas[0] * velocity(x, sigmas[0])
    slope = torch.zeros_like(x)
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas[:-1])):
        taken = sa_step(sigma, sigma_next, tau(sigma_next))
        drawn = taken.noise * fresh(step) if taken.noise else 0.0
        kept = taken.keep * x + taken.clean * clean + drawn
        predicted = kept + taken.slope * slope
        found = predicted - sigma_next * velocity(predicted, sigma_next)
        finite = math.isfinite(taken.length)
        slope = (found - clean) / taken.length if finite else torch.zeros_like(x)
        # The first step is not corrected, as in the authors' code.
        x = kept + taken.slope * slope if step and finite else predicted
        clean = found
    return clean
