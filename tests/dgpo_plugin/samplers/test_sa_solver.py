"""SA-Solver against its exact linear solution by quadrature, and what it must be at tau = 0 and 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from dgpo_plugin.algorithms.awm import sampled_at
from dgpo_plugin.samplers.ode import dpm_solver_pp_2m_step, sample_ode
from dgpo_plugin.samplers.sa_solver import sa_step, sample_sa_solver

pytestmark = pytest.mark.fast


def log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.8), (0.5, 0.45), (0.3, 0.1)])
def test_a_steps_coefficients_are_the_papers_integrals(sigma: float, sigma_next: float, tau: float) -> None:
    """Equation 11 of arXiv 2309.05019 for a constant tau, D and D's slope in lambda held."""
    start, end, kappa = log_snr(sigma), log_snr(sigma_next), 1 + tau**2
    step, h = sa_step(sigma, sigma_next, tau), end - start

    def weight(level: float) -> float:
        return kappa * sigma_next * math.exp(-(tau**2) * (end - level)) * math.exp(level)

    assert step.keep == pytest.approx(sigma_next / sigma * math.exp(-(tau**2) * h), rel=1e-12)
    assert step.clean == pytest.approx(quad(weight, start, end, epsabs=1e-13)[0], rel=1e-10)
    variance = quad(lambda level: 2 * tau**2 * math.exp(-2 * tau**2 * (end - level)), start, end, epsabs=1e-13)[0]
    assert step.noise == pytest.approx(sigma_next * math.sqrt(variance), rel=1e-10)
    # The slope's is the authors' for few steps, the same to third order in h.
    exact = quad(lambda level: weight(level) * (level - start), start, end, epsabs=1e-13)[0]
    assert step.slope == pytest.approx((1 - sigma_next) * kappa * h**2 / 2, rel=1e-12)
    assert abs(step.slope - exact) <= (1 - sigma_next) * kappa**2 * h**3 / 2


def test_marginals_stay_where_the_clean_picture_is_known() -> None:
    """From N((1 - s) D, s^2) to N((1 - s') D, s'^2), whatever tau is."""
    for tau in (0.0, 0.4, 1.0):
        step = sa_step(0.7, 0.5, tau)
        assert step.keep * 0.3 + step.clean == pytest.approx(0.5)
        assert (step.keep * 0.7) ** 2 + step.noise**2 == pytest.approx(0.25)


def test_from_pure_noise_the_first_step_is_the_limit() -> None:
    for tau in (0.0, 0.4):
        limit, near = sa_step(1.0, 0.9, tau), sa_step(1 - 1e-13, 0.9, tau)
        if tau == 0:
            assert limit.keep == pytest.approx(near.keep, abs=1e-9)
        assert limit.clean == pytest.approx(near.clean, abs=1e-9)
        assert limit.noise == pytest.approx(near.noise, abs=1e-2)


GRID = [1.0, 0.92, 0.8, 0.66, 0.5, 0.33, 0.15, 0.0]


def field(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity for pictures that are N(1.5, .4^2)."""
    clean_std = 0.4
    variance = ((1 - sigma) * clean_std) ** 2 + sigma**2
    clean = 1.5 + (1 - sigma) * clean_std**2 / variance * (x - (1 - sigma) * 1.5)
    return (x - clean) / sigma if sigma else clean * 0


def never(step: int) -> Tensor:
    raise AssertionError("no noise is asked for")


def test_at_tau_zero_the_predictor_is_dpm_solver_pp() -> None:
    x, clean, before = (torch.randn(5, generator=torch.Generator().manual_seed(n)).double() for n in range(3))
    step = sa_step(0.6, 0.5, 0.0)
    slope = (clean - before) / (log_snr(0.6) - log_snr(0.75))
    ours = step.keep * x + step.clean * clean + step.slope * slope
    theirs = dpm_solver_pp_2m_step(x, clean, before, 0.6, 0.5, 0.75)
    # Theirs has 1 - exp(-h) for h in the slope's term: the same to second order.
    assert torch.allclose(ours, theirs, atol=0.02)


def test_at_tau_zero_it_solves_the_flow_better_than_euler() -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = sample_ode(field, noise, np.linspace(1, 0, 4001).tolist(), "euler")
    ours = sample_sa_solver(field, noise, GRID, lambda sigma: 0.0, never)
    euler = sample_ode(field, noise, GRID, "euler")
    assert (ours - exact).abs().max() < 0.3 * (euler - exact).abs().max()


def awms_tau(sigma: float) -> float:
    return 0.4 if 0.3 <= sigma <= 0.9 else 0.0


def test_it_evaluates_once_a_step_and_draws_only_where_tau_is_not_zero() -> None:
    seen: list[float] = []
    asked: list[int] = []

    def watched(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return field(x, sigma)

    def fresh(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(9, dtype=torch.float64)

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sample_sa_solver(watched, noise, GRID, awms_tau, fresh)
    assert seen == GRID[:-1]
    assert asked == [1, 2, 3, 4]  # the steps that end at .8, .66, .5 and .33


def test_the_pictures_distribution_survives_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, generator=generator, dtype=torch.float64)

    def fresh(step: int) -> Tensor:
        return torch.randn(20000, generator=generator, dtype=torch.float64)

    pictures = sample_sa_solver(field, noise, np.linspace(1, 0, 41).tolist(), awms_tau, fresh)
    assert pictures.mean().item() == pytest.approx(1.5, abs=0.02)
    assert pictures.std().item() == pytest.approx(0.4, abs=0.01)


def shifted(sigma: float) -> float:
    return 3 * sigma / (1 + 2 * sigma)


NATIVE = [*(shifted(s) for s in np.linspace(1, shifted(0.001), 14).tolist()), 0.0]
"""Stable Diffusion 3.5's own fourteen steps at shift 3, as in diffusers' FlowMatchEulerDiscreteScheduler."""


def quiet(step: int) -> Tensor:
    return torch.zeros(9, dtype=torch.float64)


def test_awms_grid_is_its_codes() -> None:
    """The last noise level is half of the one before it; from .2062 to .0089 the solver would go far astray."""
    assert NATIVE[-3:] == pytest.approx([0.2062, 0.0089, 0], abs=1e-4)
    assert sampled_at(NATIVE) == [*NATIVE[:13], NATIVE[12] / 2, 0.0]
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = sample_ode(field, noise, np.linspace(1, 0, 4001).tolist(), "euler")
    published, native = (sample_sa_solver(field, noise, g, awms_tau, quiet) for g in (sampled_at(NATIVE), NATIVE))
    solved = sample_sa_solver(field, noise, sampled_at(NATIVE), lambda sigma: 0.0, never)
    assert (solved - exact).abs().max() < 0.1
    assert published.std() < 0.5 * native.std()
