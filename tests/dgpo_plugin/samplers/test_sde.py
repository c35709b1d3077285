"""The stochastic samplers against the formulas, scipy's densities and the marginals they promise to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dgpo_plugin.samplers.sde import SdeStep, cps_log_probability, cps_step, flow_sde_log_probability, flow_sde_step

pytestmark = pytest.mark.fast

AFTER_ONE = 0.85
STEPS = [(0.9, 0.75, 0.7), (0.5, 0.3, 0.7), (0.2, 0.05, 1.1), (1.0, AFTER_ONE, 0.7)]
"""(sigma, next sigma, noise level)"""
CPS_STEPS = [(1.0, 0.85, 0.8), (0.6, 0.4, 0.8), (0.3, 0.1, 0.3), (0.5, 0.25, 0.99)]


def draws(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- Flow-SDE


def drift_factors(sigma: float, sigma_next: float, level: float) -> tuple[float, float, float]:
    """Of x and of v in the mean, and sd: x + [v + sd^2 / (2 s) (x + (1 - s) v)] dt, arXiv 2505.05470 equation 9."""
    sd = level * math.sqrt(sigma / (1 - (AFTER_ONE if sigma == 1 else sigma)))
    dt = sigma_next - sigma
    correction = sd**2 / (2 * sigma) * dt
    return 1 + correction, dt + correction * (1 - sigma), sd


@pytest.mark.parametrize(("sigma", "sigma_next", "level"), STEPS)
def test_flow_sde_mean_and_std(sigma: float, sigma_next: float, level: float) -> None:
    x, v = draws(2, 3, 2, 4)
    step = flow_sde_step(x, v, sigma, sigma_next, level, AFTER_ONE)
    of_x, of_v, sd = drift_factors(sigma, sigma_next, level)
    exact(step.mean, of_x * x + of_v * v)
    assert step.std == pytest.approx(sd * math.sqrt(sigma - sigma_next), rel=1e-12)
    assert step.diffusion == pytest.approx(sd, rel=1e-12)


def test_flow_sde_in_numbers() -> None:
    """By hand: s = 1/2, s' = 1/4, a = 2: sd = 2, dt = -1/4; x (1 - 4/4) + v (1 + 4/2) (-1/4) = -3v/4; std = 1."""
    x, v = draws(2, 1, 4)
    step = flow_sde_step(x, v, 0.5, 0.25, 2.0, 0.9)
    exact(step.mean, -0.75 * v)
    assert (step.std, step.diffusion) == pytest.approx((1.0, 2.0))


def test_only_sigma_one_borrows_the_next_sigma() -> None:
    x, v = draws(2, 1, 4)
    assert flow_sde_step(x, v, 1.0, 0.8, 1.0, 0.8).diffusion == pytest.approx(math.sqrt(5))
    assert flow_sde_step(x, v, 0.9, 0.8, 1.0, 0.8).diffusion == pytest.approx(3)


@pytest.mark.parametrize(("sigma", "sigma_next", "level"), STEPS)
def test_flow_sde_log_probability_is_the_mean_normal_density(sigma: float, sigma_next: float, level: float) -> None:
    x, v, after = draws(3, 3, 2, 4)
    v.requires_grad_()
    step = flow_sde_step(x, v, sigma, sigma_next, level, AFTER_ONE)
    actual = flow_sde_log_probability(after, step)
    density = stats.norm.logpdf(after.numpy(), step.mean.detach().numpy(), step.std).reshape(3, -1).mean(1)
    exact(actual.detach(), torch.from_numpy(density))
    (gradient,) = torch.autograd.grad(actual.sum(), v)
    # d/dv of -(x' - m)^2 / (2 std^2) / D is (x' - m) / std^2 / D times dm/dv.
    of_v = drift_factors(sigma, sigma_next, level)[1]
    exact(gradient, (after - step.mean.detach()) / step.std**2 / 8 * of_v)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_best_explained_next_state_is_the_mean(steps: int) -> None:
    x, v = draws(2, 3, 5)
    step = flow_sde_step(x, v, 0.6, 0.6 - 0.1 * steps, 0.7, 0.9)
    peak = flow_sde_log_probability(step.mean, step)
    exact(peak, torch.full((3,), -math.log(step.std) - 0.9189385332046727, dtype=torch.float64))
    assert (flow_sde_log_probability(step.mean + 0.1, step) < peak).all()
    exact(cps_log_probability(step.mean, step), torch.zeros(3, dtype=torch.float64))


# ---- CPS


@pytest.mark.parametrize(("sigma", "sigma_next", "level"), CPS_STEPS)
def test_cps_mean_std_and_log_probability(sigma: float, sigma_next: float, level: float) -> None:
    x, v, after = draws(3, 3, 2, 4)
    v.requires_grad_()
    step = cps_step(x, v, sigma, sigma_next, level)
    # sqrt(s'^2 - k^2) with k = s' sin(angle) is s' cos(angle).
    kept, fresh = sigma_next * math.cos(level * math.pi / 2), sigma_next * math.sin(level * math.pi / 2)
    mean = (1 - sigma_next) * (x - sigma * v) + kept * (x + (1 - sigma) * v)
    exact(step.mean.detach(), mean.detach())
    assert (step.std, step.diffusion) == pytest.approx((fresh, fresh), rel=1e-12)
    actual = cps_log_probability(after, step)
    exact(actual.detach(), -((after - mean.detach()) ** 2).sum((1, 2)) / 8)
    (gradient,) = torch.autograd.grad(actual.sum(), v)
    exact(gradient, 2 / 8 * (after - mean.detach()) * (kept * (1 - sigma) - (1 - sigma_next) * sigma))


@pytest.mark.parametrize(("sigma", "sigma_next", "level"), CPS_STEPS)
def test_cps_keeps_the_schedules_coefficients(sigma: float, sigma_next: float, level: float) -> None:
    """With the true velocity, x' = (1 - s') x0 + kept noise + fresh noise, and kept^2 + fresh^2 = s'^2."""
    clean, noise = draws(2, 2, 6)
    step = cps_step((1 - sigma) * clean + sigma * noise, noise - clean, sigma, sigma_next, level)
    kept = (step.mean - (1 - sigma_next) * clean) / noise
    exact(kept, torch.full_like(kept, kept[0, 0].item()))
    assert kept[0, 0].item() ** 2 + step.std**2 == pytest.approx(sigma_next**2, rel=1e-12)
    assert kept[0, 0].item() > 0


def test_cps_without_noise_is_the_ode() -> None:
    x, v = draws(2, 2, 6)
    step = cps_step(x, v, 0.7, 0.4, 0.0)
    exact(step.mean, x - 0.3 * v)
    assert step.std == 0


# ---- marginals: x0 is N(0, SPREAD^2), so that every x_sigma is N(0, variance)

SPREAD, START, END = 0.6, 0.9, 0.1


def variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def velocity_factor(sigma: float) -> float:
    """E[noise - x0 | x] / x."""
    return (sigma - (1 - sigma) * SPREAD**2) / variance(sigma)


def falling(steps: int) -> list[float]:
    return [START + (END - START) * i / steps for i in range(steps + 1)]


def variance_after(steps: int, level: float) -> float:
    """The exact variance that the chain of steps ends with: each is linear in x, v' = factor^2 v + std^2."""
    one, current = torch.ones(1, 1, dtype=torch.float64), variance(START)
    for sigma, sigma_next in zip(falling(steps), falling(steps)[1:], strict=False):
        step = flow_sde_step(one, velocity_factor(sigma) * one, sigma, sigma_next, level, AFTER_ONE)
        current = step.mean.item() ** 2 * current + step.std**2
    return current


@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
def test_flow_sde_converges_to_the_marginal_variance(level: float) -> None:
    errors = [abs(variance_after(steps, level) - variance(END)) for steps in (200, 400, 800)]
    # First order: halved when the steps double. A wrong drift would leave a floor instead.
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.1)
    assert errors[2] < 0.005 * variance(END)


def test_simulated_flow_sde_keeps_the_marginal() -> None:
    count, steps = 20_000, 100
    generator = torch.Generator().manual_seed(3)
    x = math.sqrt(variance(START)) * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    for sigma, sigma_next in zip(falling(steps), falling(steps)[1:], strict=False):
        step = flow_sde_step(x, velocity_factor(sigma) * x, sigma, sigma_next, 0.7, AFTER_ONE)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    # A sample variance has a relative standard error of sqrt(2 / N) = 1 %; four of them, and the known
    # discretisation error of 100 steps. The mean has one of 1 / sqrt(N) standard deviations.
    discretisation = abs(variance_after(steps, 0.7) / variance(END) - 1)
    assert discretisation < 0.03
    assert x.var().item() / variance(END) == pytest.approx(1, abs=4 * math.sqrt(2 / count) + discretisation)
    assert abs(x.mean().item()) < 4 * math.sqrt(variance(END) / count)
    assert stats.kurtosis(x.numpy().ravel()) == pytest.approx(0, abs=4 * math.sqrt(24 / count))


# ---- precision


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(kind: torch.dtype) -> None:
    x, v, after = (draw.to(kind) for draw in draws(3, 2, 3))
    steps = {
        "flow-sde": (flow_sde_step(x, v, 0.6, 0.5, 0.7, 0.9), flow_sde_step(x.float(), v.float(), 0.6, 0.5, 0.7, 0.9)),
        "cps": (cps_step(x, v, 0.6, 0.5, 0.8), cps_step(x.float(), v.float(), 0.6, 0.5, 0.8)),
    }
    for low, high in steps.values():
        assert low.mean.dtype == torch.float32
        assert torch.equal(low.mean, high.mean)
        for log_probability in (flow_sde_log_probability, cps_log_probability):
            assert log_probability(after, low).dtype == torch.float32
            assert torch.equal(log_probability(after, low), log_probability(after.float(), low))


def test_log_probabilities_are_one_number_an_image() -> None:
    step = SdeStep(torch.zeros(5, 2, 3, 4), 0.5, 0.5)
    far_image = torch.zeros(5, 2, 3, 4)
    far_image[3] = 1.0
    assert cps_log_probability(far_image, step).tolist() == [0, 0, 0, -1, 0]
    drop = flow_sde_log_probability(far_image, step) - flow_sde_log_probability(torch.zeros(5, 2, 3, 4), step)
    np.testing.assert_allclose(drop.numpy(), [0, 0, 0, -2, 0], atol=1e-6)
