"""The deterministic samplers against the published algorithm, diffusers' schedulers and a flow solved by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from torch import Tensor

from dgpo_plugin.config.fields import OdeSampler
from dgpo_plugin.samplers.ode import dpm_flow_sigmas, dpm_solver_pp_2m_step, euler_step, sample_ode

pytestmark = pytest.mark.fast

SAMPLERS: tuple[OdeSampler, ...] = ("euler", "dpm-solver++")
SCHEDULES = {
    "from pure noise": [1.0, 0.9, 0.7, 0.45, 0.2, 0.0],
    "from below one": [0.95, 0.8, 0.5, 0.3, 0.12, 0.0],
    "one step": [1.0, 0.0],
    "two steps": [1.0, 0.6, 0.0],
    "part of the way": [0.9, 0.6, 0.5, 0.2],
}
MEAN, SPREAD = 0.4, 0.7
"""Of the Gaussian target whose flow is known in closed form."""


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    sigmas = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in sigmas] + [0.0]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- the algorithms as printed, in complex float64 (so that an imaginary step gives exact derivatives)


def oracle(velocity: Callable[[Any, float], Any], x: Any, sigmas: list[float], sampler: OdeSampler) -> Any:
    """Euler; or arXiv 2211.01095 algorithm 2 with alpha = 1 - sigma, its limits at sigma = 1 taken by infinities."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(1 - np.array(sigmas)) - np.log(np.array(sigmas))
    h = np.diff(log_snr)
    past = np.zeros_like(x)
    for i in range(len(sigmas) - 1):
        predicted = velocity(x, sigmas[i])
        if sampler == "euler":
            x = x + predicted * (sigmas[i + 1] - sigmas[i])
            continue
        data = x - sigmas[i] * predicted
        first_order = i == 0 or sigmas[i + 1] == 0
        r = np.inf if first_order else h[i - 1] / h[i]
        extrapolated = data if first_order else (1 + 1 / (2 * r)) * data - 1 / (2 * r) * past
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * (np.exp(-h[i]) - 1) * extrapolated
        past = data
    return x


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_matches_the_printed_algorithm(sampler: OdeSampler, sigmas: list[float]) -> None:
    start = noise(2, 3, 4)
    ours = sample_ode(lambda x, s: torch.sin(2 * x) + s * x, start, sigmas, sampler)
    printed = oracle(lambda x, s: np.sin(2 * x) + s * x, start.numpy(), sigmas, sampler)
    np.testing.assert_allclose(ours.numpy(), printed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_through_the_velocity_is_that_of_the_printed_algorithm(
    sampler: OdeSampler, sigmas: list[float]
) -> None:
    start = noise(2, 5)
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    loss = sample_ode(lambda x, s: torch.sin(weight * x) + s * weight, start, sigmas, sampler).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    step = 1e-30  # the imaginary step: no cancellation, so it may be as small as one likes
    w = 0.8 + 1j * step
    moved = (oracle(lambda x, s: np.sin(w * x) + s * w, start.numpy() + 0j, sigmas, sampler) ** 2).sum()
    assert gradient.item() == pytest.approx(moved.imag / step, rel=1e-10)


def test_each_step_asks_for_the_velocity_once_and_where_it_stands() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return x

    for sampler in SAMPLERS:
        sample_ode(velocity, noise(1, 2), [1.0, 0.5, 0.25, 0.0], sampler)
    assert asked == [1.0, 0.5, 0.25] * 2


def test_the_true_velocity_of_one_image_leads_to_that_image() -> None:
    start, image = noise(2, 3, 4), noise(1, 3, 4)
    for sampler in SAMPLERS:
        reached = sample_ode(lambda x, s: (x - image) / s, start, shifted(7), sampler)
        torch.testing.assert_close(reached, image.expand_as(start), rtol=0, atol=1e-12)


def test_single_steps() -> None:
    x, v, past = noise(3, 2), noise(3, 2) + 1, noise(3, 2) - 1
    torch.testing.assert_close(euler_step(x, v, 0.75, 0.5), x - v / 4, rtol=0, atol=1e-15)
    clean = x - 0.5 * v
    torch.testing.assert_close(dpm_solver_pp_2m_step(x, clean, past, 0.5, 0.0, 0.75), clean, rtol=0, atol=0)
    # Without a past it is Euler exactly: both are x0 (1 - s') + noise s' for the predicted pair.
    first = dpm_solver_pp_2m_step(x, clean, None, 0.5, 0.25, None)
    torch.testing.assert_close(first, x - v / 4, rtol=0, atol=1e-14)
    # sigma 3/4, 1/2, 1/4 are evenly spaced in log((1 - s) / s): r = 1, and D = (3 clean - past) / 2.
    second = dpm_solver_pp_2m_step(x, clean, past, 0.5, 0.25, 0.75)
    expected = x / 2 - 0.75 * (1 / 3 - 1) * (1.5 * clean - 0.5 * past)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-14)


# ---- a Gaussian target, its velocity and its flow


def variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def gaussian_velocity(x: Any, sigma: float) -> Any:
    """E[noise - x0 | x] where x0 is N(MEAN, SPREAD^2): linear regression on x."""
    return (sigma - (1 - sigma) * SPREAD**2) / variance(sigma) * (x - (1 - sigma) * MEAN) - MEAN


def gaussian_flow(x: Any, start: float, end: float) -> Any:
    """The flow keeps every point's standard score."""
    score = (x - (1 - start) * MEAN) / variance(start) ** 0.5
    return (1 - end) * MEAN + variance(end) ** 0.5 * score


def error_ratios(sampler: OdeSampler, start: float, end: float) -> list[float]:
    """How much the error at the end falls when the evenly spaced steps double, twice."""
    x = torch.tensor([[1.3]], dtype=torch.float64)
    errors = []
    for steps in (100, 200, 400):
        sigmas = [start + (end - start) * i / steps for i in range(steps)] + [end]
        errors.append(abs((sample_ode(gaussian_velocity, x, sigmas, sampler) - gaussian_flow(x, start, end)).item()))
    assert errors[-1] < 5e-3
    return [errors[0] / errors[1], errors[1] / errors[2]]


@pytest.mark.parametrize(("sampler", "factor"), [("euler", 2), ("dpm-solver++", 4)])
def test_order_of_convergence(sampler: OdeSampler, factor: float) -> None:
    assert error_ratios(sampler, 0.9, 0.1) == pytest.approx([factor] * 2, rel=0.06)


@pytest.mark.parametrize(("sampler", "low", "high"), [("euler", 1.9, 2.1), ("dpm-solver++", 3.3, 4.2)])
def test_order_of_convergence_from_noise_to_image(sampler: OdeSampler, low: float, high: float) -> None:
    # At both ends the log-SNR is infinite and even steps in sigma are long in it: second order up to a logarithm.
    assert all(low < ratio < high for ratio in error_ratios(sampler, 1.0, 0.0))


# ---- diffusers. Its schedulers compute in float32 whatever comes in: 1e-5 on values of order 1.


def diffusers_sample(scheduler: Any, start: Tensor, sigmas: list[float]) -> NDArray[np.float32]:
    x = start.float()
    for i, timestep in enumerate(scheduler.timesteps):
        predicted = gaussian_velocity(x, sigmas[i])
        x = scheduler.step(predicted, timestep, x, return_dict=False)[0]
    result: NDArray[np.float32] = x.numpy()
    return result


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_dpm_solver_equals_diffusers(steps: int, lower_order_final: bool) -> None:
    # final_sigmas_type="zero" alone makes the last step first order, as ours; euler_at_final and
    # lower_order_final (which would matter to order 3 or to a last sigma above 0) make no difference.
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        flow_shift=3.0,
        lower_order_final=lower_order_final,
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    sigmas = [*scheduler.sigmas.tolist()]
    assert 0.99 < sigmas[0] < 1
    theirs = diffusers_sample(scheduler, noise(4, 3), sigmas)
    ours = sample_ode(gaussian_velocity, noise(4, 3), sigmas, "dpm-solver++")
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)
    # ... and from sigma = 1 exactly, where Stable Diffusion 3's own schedule starts (log-SNR minus infinity).
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.tensor(shifted(steps), dtype=torch.float32)
    theirs = diffusers_sample(scheduler, noise(4, 3), shifted(steps))
    ours = sample_ode(gaussian_velocity, noise(4, 3), shifted(steps), "dpm-solver++")
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_euler_equals_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # set_timesteps shifts the sigmas that it is given
    scheduler.set_timesteps(sigmas=shifted(steps)[:-1])
    assert scheduler.sigmas.tolist() == pytest.approx(shifted(steps), abs=1e-6)
    theirs = diffusers_sample(scheduler, noise(4, 3), shifted(steps))
    ours = sample_ode(gaussian_velocity, noise(4, 3), shifted(steps), "euler")
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)


# ---- the solver's own grid


def test_the_grid_of_ten_steps_is_the_published_ones() -> None:
    """What DGPO's released code samples its rollouts on (shift 3)."""
    published = [0.9997, 0.9639, 0.9227, 0.8746, 0.8178, 0.7496, 0.6663, 0.5621, 0.4283, 0.2498, 0.0]
    assert dpm_flow_sigmas(10, 3.0) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("steps", [2, 3, 10, 28, 40])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.93])
def test_the_grid_is_the_solvers_own_schedulers(steps: int, shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    assert dpm_flow_sigmas(steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_the_solver_never_extrapolates_far_on_its_grid() -> None:
    """Half the ratio of two neighbouring steps in log((1 - s) / s) is how far past the last prediction it goes."""

    def furthest(sigmas: list[float]) -> float:
        steps = np.diff([np.log((1 - s) / s) for s in sigmas if 0 < s < 1])
        return float(max(later / (2 * earlier) for earlier, later in itertools.pairwise(steps)))

    assert furthest(dpm_flow_sigmas(10, 3.0)) < 0.76
    # The native grid of Stable Diffusion 3, which shifts the ends of its table before it shifts what lies between.
    native = FlowMatchEulerDiscreteScheduler(shift=3.0)
    native.set_timesteps(10)
    assert furthest(native.sigmas.tolist()) > 2


@pytest.mark.parametrize("guidance_like", [1.0, 4.0])
def test_on_its_grid_the_solver_is_nearer_to_the_flow_than_on_the_native_one(guidance_like: float) -> None:
    """The Gaussian's velocity with its deviation from the noise's own exaggerated, as guidance does."""
    start = noise(4, 3)

    def velocity(x: Any, sigma: float) -> Any:
        plain = -x  # what a model that knows nothing of the picture would say
        return (
            plain + guidance_like * (gaussian_velocity(x, sigma) - plain)
            if guidance_like > 1
            else gaussian_velocity(x, sigma)
        )

    fine = sample_ode(velocity, start, dpm_flow_sigmas(2000, 3.0), "dpm-solver++")
    native = FlowMatchEulerDiscreteScheduler(shift=3.0)
    native.set_timesteps(10)
    ours = (sample_ode(velocity, start, dpm_flow_sigmas(10, 3.0), "dpm-solver++") - fine).abs().max()
    before = (sample_ode(velocity, start, native.sigmas.tolist(), "dpm-solver++") - fine).abs().max()
    assert ours < before / 2
