"""The forward-process algorithms' whole gradients, image by image in float64, from the papers' own forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Algorithm, Random, Rollout
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.algorithm_cases import config_for, in_float64, make_algorithm, rollout_and_advantages

pytestmark = pytest.mark.fast

GROUPS, SIZE, STEPS = 2, 4, 4
Loss = Callable[["Image"], Tensor]


@dataclass
class Image:
    """One image at one flow time: the velocities there and what else a formula names."""

    x0: Tensor
    x: Tensor
    s: float
    target: Tensor
    v: Tensor
    old: Tensor
    base: Tensor
    advantage: float


def mean_square(e: Tensor) -> Tensor:
    return (e * e).sum() / e.numel()


def mean_size(e: Tensor) -> float:
    return max(float(e.detach().abs().sum()) / e.numel(), 1e-5)


def nft(i: Image) -> Tensor:
    """x-space, as published: x+- = x_s - s v+-, errors against x0, r of the clipped advantage."""
    mix, kl = 0.7, 0.3
    r = min(max(i.advantage / 10 + 0.5, 0), 1)
    errors = []
    for v in (mix * i.v + (1 - mix) * i.old, (1 + mix) * i.old - mix * i.v):
        e = i.x - i.s * v - i.x0
        errors.append(mean_square(e) / mean_size(e))
    return 5 * (r * errors[0] + (1 - r) * errors[1]) / mix + kl * mean_square(i.v - i.base)


def ram(i: Image) -> Tensor:
    goal = i.base + 3 * i.advantage * (i.target - i.old)
    return mean_square(i.v - goal.detach())


def ram_as_in_the_paper(i: Image) -> Tensor:
    goal = i.base + 3 * i.advantage * (i.target - i.v)
    return mean_square(i.v - goal.detach())


def awm(i: Image) -> Tensor:
    d = mean_square(i.v - i.target)
    likelihood = -(i.s / 0.25) * ((d + 1e-10) ** 0.25 - 1e-10**0.25)
    ratio = torch.exp(likelihood - likelihood.detach())
    policy = torch.maximum(-i.advantage / 5 * ratio, -i.advantage / 5 * ratio.clamp(0, 2))
    return policy + 0.2 * mean_square(i.v - i.base) + 0.6 * mean_square(i.v - i.old)


def elbo(i: Image) -> Tensor:
    e = (i.x - i.s * i.v) - i.x0
    clean, clean_old = i.x - i.s * i.v, i.x - i.s * i.old
    soft = 3 * math.tanh(i.advantage / 3)
    return soft * mean_square(e) / mean_size(e) + 0.4 * mean_square(clean - clean_old)


def elbo_plain(i: Image) -> Tensor:
    return i.advantage * mean_square(i.v - i.target) + 0.1 * mean_square(i.v - i.base)


def every(steps: list[int]) -> Callable[[Random, int, int], list[tuple[int, float | int]]]:
    return lambda draw, p, g: [(step, step) for step in steps]


def strata_of(draw: Random, runs: list[list[int]]) -> list[tuple[int, float | int]]:
    return [(run[k], run[k]) for n, run in enumerate(runs) for k in draw.choose(1, len(run), "timesteps", n)]


CASES: dict[str, tuple[str, list[str], Loss, Callable[[Random, int, int], list[tuple[int, float | int]]], bool]] = {
    "nft": (
        "nft",
        ["timesteps=3", "mix=0.7", "kl_weight=0.3"],
        nft,
        lambda draw, p, g: [(step, step) for step in draw.choose(3, STEPS, "timesteps", p, g)],
        False,
    ),
    "ram": (
        "ram",
        ["timesteps=3", "multiplier=3"],
        ram,
        lambda draw, p, g: [(n, math.sqrt(1 - u)) for n, u in enumerate(draw.uniform(3, "timesteps", p))],
        False,
    ),
    "ram, the paper's": (
        "ram",
        ["timesteps=3", "multiplier=3", "bend_with=policy"],
        ram_as_in_the_paper,
        lambda draw, p, g: [(n, math.sqrt(1 - u)) for n, u in enumerate(draw.uniform(3, "timesteps", p))],
        False,
    ),
    "awm": (
        "awm",
        ["timesteps=2", "first_step=1", "last_step=3", "kl_weight=0.2", "old_weight=0.6"],
        awm,
        lambda draw, p, g: strata_of(draw, [[1], [2, 3]]),
        False,
    ),
    "v-grpo": (
        "elbo",
        ["timesteps=2", "soft_clip=3", "old_weight=0.4"],
        elbo,
        lambda draw, p, g: strata_of(draw, [[0, 1], [2, 3]]),
        True,
    ),
    "elbo, plain": (
        "elbo",
        [
            "timesteps=2",
            "steps=noisiest",
            "noisiest_steps=3",
            "normalized=false",
            "shared_noise=false",
            "kl_weight=0.1",
        ],
        elbo_plain,
        lambda draw, p, g: [(step, step) for step in draw.choose(2, 3, "timesteps")],
        False,
    ),
}
"""By case: the algorithm, its settings, the loss of one image, the (noise's number, step or sigma) that an image is
trained on, and whether a group shares its noise."""


def prepared(name: str, policy: Policy, *settings: str) -> tuple[Rollout, Tensor, Algorithm[Any, Any]]:
    """In float64, with an old policy that is not the policy."""
    in_float64(policy)
    config = config_for(name, f"rollout.steps={STEPS}", *[f"algorithm.{setting}" for setting in settings])
    rollout, advantages = rollout_and_advantages(config, policy)
    algorithm = make_algorithm(config, policy)
    for copy in algorithm.state().values():
        for tensor in copy.values():
            tensor.mul_(0.9)
    return rollout, advantages, algorithm


def alone(policy: Policy, x: Tensor, s: float, rollout: Rollout, row: int, guidance: float = 1.0) -> Tensor:
    with_text = policy.model.velocity(x[None], s, rollout.conditioning[[row]])[0]
    if guidance == 1:
        return with_text
    without = policy.model.velocity(x[None], s, policy.unconditional)[0]
    return without + guidance * (with_text - without)


def image(
    policy: Policy, old: Any, rollout: Rollout, row: int, noise: Tensor, s: float, given: tuple[float, float]
) -> Image:
    """Row ``row`` of a rollout at flow time s, with its advantage and the base's guidance."""
    advantage, guidance = given
    x0 = rollout.latents[row].double()
    x = (1 - s) * x0 + s * noise.double()
    with policy.as_reference():
        base = alone(policy, x, s, rollout, row, guidance)
    with policy.with_weights(old):
        before = alone(policy, x, s, rollout, row)
    return Image(x0, x, s, noise.double() - x0, alone(policy, x, s, rollout, row), before, base, advantage)


def slopes_of(policy: Policy, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters.values())))


def ours(policy: Policy, algorithm: Algorithm[Any, Any], rollout: Rollout, advantages: Tensor) -> list[Tensor]:
    for parameter in policy.parameters.values():
        parameter.grad = None
    algorithm.gradient(rollout, advantages, Random(0, 2))
    return [parameter.grad.clone() for parameter in policy.parameters.values()]  # type: ignore[union-attr]


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    assert max(float(slope.abs().max()) for slope in expected) > 1e-6
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def compare_in_batches(
    sizes: tuple[int | None, ...],
    policy: Policy,
    algorithm: Algorithm[Any, Any],
    rollout: Rollout,
    advantages: Tensor,
    loss: Tensor,
) -> None:
    """Our gradient against that of a loss, in micro-batches of several sizes."""
    expected = slopes_of(policy, loss)
    for size in sizes:
        algorithm.micro_batch_size = size
        compare(ours(policy, algorithm, rollout, advantages), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_paper_image_by_image(policy: Policy, case: str) -> None:
    name, settings, loss_of, times_of, shared = CASES[case]
    rollout, advantages, algorithm = prepared(name, policy, *settings)
    draw, total, count = Random(0, 2), torch.zeros((), dtype=torch.float64), 0
    for p in range(GROUPS):
        for g in range(SIZE):
            for number, at in times_of(draw, p, g):
                key = (number, p) if shared else (number, p, g)
                noise = draw.noise(rollout.latents.shape[1:], "training noise", *key)
                s = at if isinstance(at, float) else rollout.sigmas[at]
                row, advantage = p * SIZE + g, float(advantages[p, g])
                total = total + loss_of(image(policy, algorithm.state()["old"], rollout, row, noise, s, (advantage, 1)))
                count += 1
    compare_in_batches((None, 3), policy, algorithm, rollout, advantages, total / count)


def test_crds_gradient_is_that_of_the_paper_centered_in_the_group(policy: Policy) -> None:
    settings = ["timesteps=5", "noisiest_steps=3", "beta=1.5", "anchor_weight=0.2", "reference_guidance=2"]
    rollout, advantages, algorithm = prepared("crd", policy, *settings)
    old = algorithm.state()["old"]
    draw, total, beta = Random(0, 2), torch.zeros((), dtype=torch.float64), 1.5
    for number, u in enumerate(draw.uniform(5, "timesteps")):
        s = rollout.sigmas[int((number + u) * 3 / 5)]
        for p in range(GROUPS):
            implied, rewards, anchors = [], [], []
            for g in range(SIZE):
                noise = draw.noise(rollout.latents.shape[1:], "training noise", number, p, g)
                i = image(policy, old, rollout, p * SIZE + g, noise, s, (float(advantages[p, g]), 2))
                r = min(max(i.advantage / 10 + 0.5, 0), 1)
                e, e_old = i.v - i.target, i.old - i.target
                implied.append(-(mean_square(e) / mean_size(e) - mean_square(e_old) / mean_size(e_old)))
                rewards.append(r)
                anchors.append(0.2 * (1e-4 / 0.2 + r * (1 - 1e-4 / 0.2)) * mean_square(i.v - i.base))
            mean_implied, mean_reward = sum(x.item() for x in implied) / SIZE, sum(rewards) / SIZE
            for rho, r, anchor in zip(implied, rewards, anchors, strict=True):
                total = total + 5 / beta * (beta * (rho - mean_implied) - (r - mean_reward)) ** 2 + anchor
    compare_in_batches((None, 3, 4), policy, algorithm, rollout, advantages, total / (5 * GROUPS * SIZE))


def test_in_later_updates_v_grpos_ratio_has_the_mean_over_the_times_in_its_exponent(policy: Policy) -> None:
    """-min(ratio A, clip(ratio) A), differentiated as it stands."""
    rollout, advantages, algorithm = prepared("elbo", policy, "timesteps=2", "ratio_clip=0.0002")
    rollout = replace(rollout, sample_ids=rollout.sample_ids + GROUPS * SIZE, first_group=GROUPS, first_update=False)
    draw, losses, out = Random(0, 2), [], 0
    for p in range(GROUPS):
        for g in range(SIZE):
            surrogates = []
            for number, step in strata_of(draw, [[0, 1], [2, 3]]):
                noise = draw.noise(rollout.latents.shape[1:], "training noise", number, GROUPS + p)
                s, a = rollout.sigmas[int(step)], float(advantages[p, g])
                i = image(policy, algorithm.state()["old"], rollout, p * SIZE + g, noise, s, (a, 1))
                pair = []
                for v in (i.v, i.old):
                    e = i.x - s * v - i.x0
                    pair.append(mean_square(e) / mean_size(e))
                surrogates.append(pair)
            new, before = (torch.stack([pair[k] for pair in surrogates]).mean() for k in (0, 1))
            ratio = torch.exp(before - new)
            a = float(advantages[p, g])
            losses.append(-torch.minimum(ratio * a, ratio.clamp(0.9998, 1.0002) * a))
            out += int(ratio > 1.0002 if a > 0 else ratio < 0.9998)
    assert 0 < out < GROUPS * SIZE
    compare_in_batches((None, 3), policy, algorithm, rollout, advantages, torch.stack(losses).mean())
    assert algorithm.gradient(rollout, advantages, draw)["clip_fraction"] == pytest.approx(out / (GROUPS * SIZE))


# ---- what is known of them besides


def test_dgpo_whose_weight_is_one_half_is_a_policy_gradient_on_the_elbo(policy: Policy) -> None:
    shared = ["timesteps=2", "noisiest_steps=3", "kl_weight=0.1", "reference_guidance=2"]
    rollout, advantages, dgpo = prepared("dgpo", policy, *shared, "beta=1e-12", "clip=null")
    settings = [*shared, "scale=0.5", "steps=noisiest", "normalized=false"]
    elbo = make_algorithm(config_for("elbo", *[f"algorithm.{setting}" for setting in settings]), policy)
    compare(ours(policy, elbo, rollout, advantages), ours(policy, dgpo, rollout, advantages))


def test_awm_with_the_papers_likelihood_is_a_fifth_of_that_policy_gradient(policy: Policy) -> None:
    awm_settings = ["timesteps=2", "first_step=0", "last_step=1", "likelihood=uniform", "kl_weight=0", "old_weight=0"]
    rollout, advantages, awm = prepared("awm", policy, *awm_settings)
    settings = ["timesteps=2", "noisiest_steps=2", "steps=noisiest", "normalized=false", "shared_noise=false"]
    settings += ["scale=0.2"]
    elbo = make_algorithm(config_for("elbo", *[f"algorithm.{setting}" for setting in settings]), policy)
    compare(ours(policy, awm, rollout, advantages), ours(policy, elbo, rollout, advantages))


def test_processes_that_must_keep_step_add_up_to_the_same(policy: Policy) -> None:
    rollout, advantages, algorithm = prepared("nft", policy, "timesteps=2")
    expected = ours(policy, algorithm, rollout, advantages)
    algorithm.processes = Processes(lockstep=True)
    with policy.counting() as cost:
        compare(ours(policy, algorithm, rollout, advantages), expected)
    assert cost.differentiated == STEPS * GROUPS * SIZE * 3  # every sample at every step, on every process
