"""Flow-GRPO-Guard, Flow-DPPO and the moving window: losses in float64, and whole gradients, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Random
from dgpo_plugin.algorithms.flow_dppo import FlowDPPO, dppo_loss, outside
from dgpo_plugin.algorithms.flow_grpo import FlowGRPOFast, FlowGRPOFastConfig
from dgpo_plugin.algorithms.flow_grpo_guard import normalized_ratio
from dgpo_plugin.algorithms.trajectories import TrajectoryRollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.algorithm_cases import (
    config_for,
    in_float64,
    make_algorithm,
    mean_and_std,
    rollout_and_advantages,
)

pytestmark = pytest.mark.fast

N, DIMS = 6, (3, 2)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N, *DIMS)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_guards_ratio_and_its_gradient() -> None:
    """A Gaussian's log-ratio, centered: only the part that is linear in the noise is left, times the step's std."""
    old, noise, std = drawn(0), drawn(1), 0.3
    mean = (old + 0.1 * drawn(2)).requires_grad_()
    x = old + std * noise
    log_ratio = (((x - old) ** 2 - (x - mean) ** 2) / (2 * std**2)).mean((1, 2))
    found = normalized_ratio(log_ratio, mean, old, std)
    linear = torch.exp((noise * (mean - old)).mean((1, 2)))
    torch.testing.assert_close(found, linear, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(r.sum(), mean, retain_graph=True)[0] for r in (found, linear)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "divergence", "advantage", "out"),
    [
        (1.1, 2e-5, 1.0, True),
        (0.9, 2e-5, -1.0, True),
        (1.1, 1e-5, 1.0, True),  # at the threshold
        (1.1, 0.9e-5, 1.0, False),  # still near
        (0.9, 2e-5, 1.0, False),  # on its way back
        (1.1, 2e-5, -1.0, False),
        (1.0, 2e-5, 1.0, False),
    ],
)
def test_dppo_drops_what_would_go_further(ratio: float, divergence: float, advantage: float, out: bool) -> None:
    leaf, moved, good = (torch.tensor([x], dtype=torch.float64) for x in (ratio, divergence, advantage))
    assert outside(leaf, moved, good, threshold=1e-5).tolist() == [out]
    loss = dppo_loss(leaf.requires_grad_(), good, torch.tensor([out]))
    assert torch.autograd.grad(loss.sum(), leaf)[0].item() == (0 if out else -advantage)


# ---- whole gradients, in an update that is not the first


def later_update(name: str, policy: Policy, *settings: str) -> tuple[TrajectoryRollout, Tensor, Any]:
    """In float64: a rollout of an older policy, as if of an iteration's second update."""
    in_float64(policy)
    config = config_for(name, *[f"algorithm.{setting}" for setting in settings])
    rollout, advantages = rollout_and_advantages(config, policy)
    for parameter in policy.parameters.values():
        parameter.data += 0.01 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).to(parameter))
    assert isinstance(rollout, TrajectoryRollout)
    shifted = replace(
        rollout, sample_ids=rollout.sample_ids + len(rollout.sample_ids), first_group=2, first_update=False
    )
    return shifted, advantages, make_algorithm(config, policy)


StepLoss = Callable[[Tensor, Tensor, Tensor, float, float, float], Tensor]


def guard(x_next: Tensor, mean: Tensor, old: Tensor, std: float, length: float, a: float) -> Tensor:
    logp, logp_old = ((-((x_next - m) ** 2) / (2 * std**2)).mean() for m in (mean, old))
    ratio = torch.exp((logp - logp_old + ((mean - old) ** 2).mean() / (2 * std**2)) * std)
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-5, 1 + 1e-5)) / length


def dppo(cps: bool) -> StepLoss:
    def loss(x_next: Tensor, mean: Tensor, old: Tensor, std: float, length: float, a: float) -> Tensor:
        scale = 1.0 if cps else 2 * std**2
        ratio = torch.exp((((x_next - old) ** 2 - (x_next - mean) ** 2) / scale).mean())
        kl = float(((mean - old) ** 2).mean().detach()) / (2 * std**2)
        if kl >= 1e-7 and ((ratio > 1 and a > 0) or (ratio < 1 and a < 0)):
            return 0 * ratio
        return -a * ratio

    return loss


@pytest.mark.parametrize(
    ("name", "kind", "settings", "loss_of", "level", "clean"),
    [
        ("flow-grpo-guard", "flow-sde", ["clip=1e-5", "kl_weight=0.2"], guard, 0.7, False),
        ("flow-dppo", "flow-sde", ["threshold=1e-7", "kl_weight=0.2"], dppo(False), 0.7, False),
        ("flow-dppo", "cps", ["sampler=cps", "threshold=1e-7", "kl_weight=0.2", "kl_of=clean"], dppo(True), 0.7, True),
    ],
)
def test_the_gradient_is_that_of_the_formulas(
    policy: Policy, name: str, kind: str, settings: list[str], loss_of: StepLoss, level: float, clean: bool
) -> None:
    rollout, advantages, algorithm = later_update(name, policy, *settings)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(rollout.sample_ids)):
        for index, step in enumerate(rollout.steps):
            x, x_next = rollout.noisy_latents[row, index], rollout.next_latents[row, index]
            s, after = rollout.sigmas[step], rollout.sigmas[step + 1]
            text = rollout.conditioning[[row]]
            v = policy.model.velocity(x[None], s, text)[0]
            with policy.as_reference():
                base = policy.model.velocity(x[None], s, text)[0]
            mean, std = mean_and_std(kind, x, v, rollout.sigmas, step, level)
            base_mean, _ = mean_and_std(kind, x, base, rollout.sigmas, step, level)
            assert rollout.means is not None
            losses = loss_of(x_next, mean, rollout.means[row, index], std, s - after, float(advantages.flatten()[row]))
            diffusion = std if kind == "cps" else std / math.sqrt(s - after)
            kl = ((s * (v - base)) ** 2).mean() if clean else ((mean - base_mean) ** 2).mean() / (2 * diffusion**2)
            total, count = total + losses + 0.2 * kl, count + 1
    expected = torch.autograd.grad(total / count, list(policy.parameters.values()))
    for size in (None, 3):
        algorithm.micro_batch_size = size
        for parameter in policy.parameters.values():
            parameter.grad = None
        logged = algorithm.gradient(rollout, advantages, Random(0, 0))
        assert 0 < logged["clip_fraction"] < 1
        for parameter, slope in zip(policy.parameters.values(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-11)


# ---- the window


def test_a_moving_window_goes_from_the_noisiest_step_to_the_end_of_its_range_and_anew(policy: Policy) -> None:
    settings = ["algorithm.window=2", "algorithm.window_range=3", "algorithm.window_every=2"]
    algorithm = make_algorithm(config_for("flow-grpo-fast", *settings), policy)
    assert isinstance(algorithm, FlowGRPOFast)
    windows = [algorithm._choose_steps(4, Random(0, iteration))[0] for iteration in range(8)]  # noqa: SLF001
    assert windows == [[0, 1], [0, 1], [1, 2], [1, 2], [0, 1], [0, 1], [1, 2], [1, 2]]


def test_without_it_the_window_is_drawn_as_before(policy: Policy) -> None:
    algorithm = make_algorithm(config_for("flow-grpo-fast", "algorithm.window=2"), policy)
    assert isinstance(algorithm, FlowGRPOFast)
    firsts = [algorithm._choose_steps(4, Random(0, iteration))[0][0] for iteration in range(40)]  # noqa: SLF001
    assert firsts == [Random(0, iteration).choose(1, 2, "window")[0] for iteration in range(40)]
    assert 10 < np.sum(firsts) < 30
    assert FlowGRPOFastConfig().window_every is None


def test_dppos_steps_are_any_of_the_noisiest(policy: Policy) -> None:
    """As in both of the authors' codes, which draw three of the first five, or six, without replacement."""
    algorithm = make_algorithm(config_for("flow-dppo", "algorithm.window=2", "algorithm.window_range=3"), policy)
    assert isinstance(algorithm, FlowDPPO)
    drawn = {tuple(algorithm._choose_steps(4, Random(0, iteration))[1]) for iteration in range(40)}  # noqa: SLF001
    assert drawn == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["flow-dppo", "algorithm.window=6"], r"window \(6\) cannot exceed window_range"),
        (["flow-dppo", "algorithm.sampler=cps", "algorithm.noise_level=1"], r"noise_level \(1.0\) must be below 1"),
        (["flow-dppo", "rollout.schedule=dpm"], "rollout.schedule dpm: is for deterministic samplers"),
        (["flow-grpo-guard", "rollout.schedule=dpm"], "leave it out for flow-grpo-guard"),
        (["awm", "algorithm.last_step=4"], r"rollout.steps \(4\) must be more than algorithm.last_step \(4\)"),
        (["awm", "algorithm.timesteps=4"], r"timesteps \(4\) cannot exceed the steps from first_step \(1\)"),
        (["nft", "algorithm.timesteps=5"], r"rollout.steps \(4\) must be at least 5 for algorithm.timesteps"),
        (["elbo", "algorithm.timesteps=5"], r"rollout.steps \(4\) must be at least 5 for algorithm.timesteps"),
        (["elbo", "algorithm.steps=noisiest"], r"rollout.steps \(4\) must be at least 5 for algorithm.noisiest_steps"),
        (["crd", "algorithm.noisiest_steps=5"], r"rollout.steps \(4\) must be at least 5 for algorithm.noisiest"),
    ],
)
def test_settings_that_ask_for_what_the_rollout_cannot_give(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_for(*settings)
    assert "\n" not in str(caught.value)
