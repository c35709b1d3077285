"""Guided velocities in the loss, against the formulas in float64, image by image; and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Random, Rollout
from dgpo_plugin.algorithms.base import Cost
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.algorithm_cases import config_for
from tests.dgpo_plugin.algorithms.test_forward_oracles import (
    GROUPS,
    SIZE,
    compare_in_batches,
    mean_size,
    mean_square,
    prepared,
)

pytestmark = pytest.mark.fast

HALVES = ["both", "conditional", "unconditional"]
GUIDANCE, OF_BASE = 2.5, 3.0


def guided(policy: Policy, x: Tensor, s: float, rollout: Rollout, row: int, guidance: float, half: str) -> Tensor:
    """u + g (v - u), the one of u and v that has no gradient detached."""
    v = policy.model.velocity(x[None], s, rollout.conditioning[[row]])[0]
    u = policy.model.velocity(x[None], s, policy.unconditional)[0]
    v, u = (v.detach() if half == "unconditional" else v), (u.detach() if half == "conditional" else u)
    return u + guidance * (v - u)


@pytest.mark.parametrize("half", HALVES)
def test_dgpos_gradient_with_guided_velocities(policy: Policy, half: str) -> None:
    settings = ["timesteps=2", "noisiest_steps=3", "beta=3", "clip=0.0003", "kl_weight=0.1"]
    settings += [f"training_guidance={GUIDANCE}", f"reference_guidance={OF_BASE}", f"differentiated_half={half}"]
    rollout, advantages, algorithm = prepared("dgpo", policy, *settings)
    algorithm.resume(5)  # the old policy is not the policy
    draw, total, out = Random(0, 2), torch.zeros((), dtype=torch.float64), 0
    for step in draw.choose(2, 3, "timesteps"):
        s = rollout.sigmas[step]
        for p in range(GROUPS):
            noise = draw.noise(rollout.latents.shape[1:], "training noise", step, p).double()
            new, before, reference, distance = [], [], [], []
            for g in range(SIZE):
                row = p * SIZE + g
                x0 = rollout.latents[row].double()
                x, target = (1 - s) * x0 + s * noise, noise - x0
                v = guided(policy, x, s, rollout, row, GUIDANCE, half)
                with policy.as_reference():
                    base = guided(policy, x, s, rollout, row, OF_BASE, "both")
                with policy.with_weights(algorithm.state()["old"]):
                    old = guided(policy, x, s, rollout, row, GUIDANCE, "both")
                new.append(mean_square(v - target))
                before.append(float(mean_square(old - target)))
                reference.append(float(mean_square(base - target)))
                distance.append(mean_square(v - base))
            score = 3 / SIZE * sum(float(advantages[p, g]) * (new[g].item() - reference[g]) for g in range(SIZE))
            w = 1 / (1 + math.exp(-score))
            for g in range(SIZE):
                a, ratio = float(advantages[p, g]), math.exp(before[g] - new[g].item())
                left = ratio > 1.0003 if a > 0 else ratio < 0.9997
                out += left
                total = total + w * a * (new[g].detach() if left else new[g]) + 0.1 * distance[g]
    assert 0 < out < 2 * GROUPS * SIZE
    compare_in_batches((None, 3, SIZE), policy, algorithm, rollout, advantages, total / (2 * GROUPS * SIZE))


@pytest.mark.parametrize("half", HALVES)
def test_the_policy_gradient_on_the_elbo_with_guided_velocities(policy: Policy, half: str) -> None:
    settings = ["timesteps=2", "steps=noisiest", "noisiest_steps=3", "kl_weight=0.1", "old_weight=0.4"]
    settings += [f"training_guidance={GUIDANCE}", f"reference_guidance={OF_BASE}", f"differentiated_half={half}"]
    rollout, advantages, algorithm = prepared("elbo", policy, *settings)
    draw, total = Random(0, 2), torch.zeros((), dtype=torch.float64)
    for step in draw.choose(2, 3, "timesteps"):
        s = rollout.sigmas[step]
        for row in range(GROUPS * SIZE):
            noise = draw.noise(rollout.latents.shape[1:], "training noise", step, row // SIZE).double()
            x0 = rollout.latents[row].double()
            x = (1 - s) * x0 + s * noise
            v = guided(policy, x, s, rollout, row, GUIDANCE, half)
            with policy.as_reference():
                base = guided(policy, x, s, rollout, row, OF_BASE, "both")
            with policy.with_weights(algorithm.state()["old"]):
                old = guided(policy, x, s, rollout, row, GUIDANCE, "both")
            e = (x - s * v) - x0
            total = total + float(advantages.flatten()[row]) * mean_square(e) / mean_size(e)
            total = total + 0.1 * mean_square(v - base) + 0.4 * mean_square(s * (v - old))
    compare_in_batches((None, 3), policy, algorithm, rollout, advantages, total / (2 * GROUPS * SIZE))


@pytest.mark.parametrize("size", [SIZE, 2])
@pytest.mark.parametrize(("half", "kept"), [("both", GUIDANCE), ("conditional", 1), ("unconditional", 1)])
@pytest.mark.parametrize("name", ["dgpo", "elbo"])
def test_what_is_run_is_what_the_cost_says(policy: Policy, name: str, half: str, kept: float, size: int) -> None:
    """Half a gradient costs a forward and not three, and keeps the graph of one pass and not of two."""
    settings = ["kl_weight=0.1", f"training_guidance={GUIDANCE}", "reference_guidance=2", f"differentiated_half={half}"]
    settings += ["clip=0.1"] if name == "dgpo" else ["old_weight=0.4"]
    rollout, advantages, algorithm = prepared(name, policy, *settings)
    algorithm.micro_batch_size = size
    algorithm.resume(5)
    given = [f"algorithm.{setting}" for setting in settings]
    cost: Cost = type(algorithm).cost(config_for(name, *given, f"training.micro_batch_size={size}"))
    with policy.counting() as counted:
        algorithm.gradient(rollout, advantages, Random(0, 2))
    assert counted.total == cost.training * GROUPS * SIZE
    assert counted.differentiated == 3 * cost.trained_steps * GROUPS * SIZE * (2 if half == "both" else 1)
    assert cost.training_guidance == kept
