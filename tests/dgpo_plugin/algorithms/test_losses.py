"""The losses against formulas written in plain float64 numpy, and the identities that the methods rest on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dgpo_plugin.algorithms.dgpo import clipped, dgpo_loss, group_weight
from dgpo_plugin.algorithms.flow_grpo import policy_loss
from dgpo_plugin.algorithms.forward import matching_error
from dgpo_plugin.algorithms.trajectories import kl_divergence

pytestmark = pytest.mark.fast

quick = settings(max_examples=40, deadline=None, derandomize=True)
PROMPTS, GROUP = 3, 5
Array = NDArray[np.float64]


def array(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def errors(seed: int) -> Array:
    """Matching errors (P, G): positive and of order one."""
    return np.abs(array(PROMPTS, GROUP, seed=seed)) + 0.1


def leaf(values: Array) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def exact(actual: Tensor, expected: Array) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def gradient(loss: Tensor, *inputs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, inputs)[0]


def finite_difference(f: Callable[[Array], Array], x: Array, step: float = 1e-5) -> Array:
    """Gradient of sum f, by central differences: good to about 1e-10 for the functions here."""
    slopes = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += step
        behind[index] -= step
        slopes[index] = (f(ahead) - f(behind)).sum() / (2 * step)
    return slopes


# ---- matching error


def test_matching_error_is_the_mean_square_over_all_but_the_batch() -> None:
    predicted, target = array(2, 3, 4), array(2, 3, 4, seed=1)
    given_predicted = leaf(predicted)
    d = matching_error(given_predicted, torch.tensor(target))
    exact(d, ((predicted - target) ** 2).sum((1, 2)) / 12)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    slope = gradient((weights * d).sum(), given_predicted)
    exact(slope, 2 / 12 * (predicted - target) * np.array([2.0, -1.0])[:, None, None])


# ---- the group weight


def oracle_score(d: Array, reference: Array, advantages: Array, beta: float) -> list[float]:
    """S_g = (beta / G) sum over the group of A (d - d_ref), one loop at a time."""
    return [
        beta / d.shape[1] * sum(advantages[p, g] * (d[p, g] - reference[p, g]) for g in range(d.shape[1]))
        for p in range(d.shape[0])
    ]


@pytest.mark.parametrize("beta", [0.5, 10.0, 100.0])
def test_group_weight(beta: float) -> None:
    d, reference, advantages = errors(0), errors(1), array(PROMPTS, GROUP, seed=2)
    weight = group_weight(torch.tensor(d), torch.tensor(reference), torch.tensor(advantages), beta)
    assert weight.shape == (PROMPTS,)
    exact(weight, np.array([1 / (1 + math.exp(-score)) for score in oracle_score(d, reference, advantages, beta)]))


def test_group_weight_in_numbers() -> None:
    """G = 2, A = (1, -1): the good image is worse matched than the reference by 0.2, the bad one better by 0.1."""
    d, reference = torch.tensor([[0.5, 0.3]]), torch.tensor([[0.3, 0.4]])
    weight = group_weight(d, reference, torch.tensor([[1.0, -1.0]]), beta=10)
    assert weight.item() == pytest.approx(1 / (1 + math.exp(-10 / 2 * (0.2 + 0.1))))
    assert weight.item() > 0.5  # ranked wrongly: there is more to learn
    assert group_weight(d, d, torch.tensor([[1.0, -1.0]]), beta=10).item() == 0.5


matrices = st.integers(1, 4).flatmap(
    lambda p: st.integers(2, 6).flatmap(
        lambda g: st.lists(
            st.lists(st.floats(0, 2), min_size=3 * g, max_size=3 * g).map(lambda row: np.array(row).reshape(3, g)),
            min_size=p,
            max_size=p,
        ).map(lambda rows: np.stack(rows, axis=1))
    )
)
"""(3, P, G): d, d_ref, and d_old or, doubled and shifted, A."""


@quick
@given(matrices, st.floats(0.01, 3))
def test_group_weight_lies_strictly_between_zero_and_one(values: Array, beta: float) -> None:
    d, reference, third = map(torch.tensor, values)
    weight = group_weight(d, reference, 5 * (third - 1), beta)  # |S| <= 30, far from where float64 saturates
    assert ((weight > 0) & (weight < 1)).all()


@quick
@given(matrices, st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_the_order_of_images_in_a_group_is_without_effect(values: Array, beta: float, random: object) -> None:
    order = list(range(values.shape[2]))
    random.shuffle(order)  # type: ignore[attr-defined]
    d, reference, third = map(torch.tensor, values)
    advantages = third - 1
    before = group_weight(d, reference, advantages, beta)
    after = group_weight(d[:, order], reference[:, order], advantages[:, order], beta)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)
    out = clipped(d, reference, advantages, 0.01)
    assert torch.equal(clipped(d[:, order], reference[:, order], advantages[:, order], 0.01), out[:, order])
    w = before[:, None]
    assert torch.equal(dgpo_loss(d, w, advantages, out)[:, order], dgpo_loss(d[:, order], w, advantages[:, order], out))


def test_groups_do_not_mix() -> None:
    d, reference, advantages = map(torch.tensor, (errors(0), errors(1), array(PROMPTS, GROUP, seed=2)))
    before = group_weight(d, reference, advantages, 10)
    d[1] += 0.5
    changed = group_weight(d, reference, advantages, 10) != before
    assert changed.tolist() == [False, True, False]


# ---- the trust region


@pytest.mark.parametrize(
    ("advantage", "ratio", "out"),
    [
        (1.0, 1.2, True),  # a good image already matched better than before: enough
        (1.0, 1.05, False),
        (1.0, 0.5, False),  # a good image matched worse: keep learning
        (-1.0, 0.8, True),  # a bad image already matched worse: enough
        (-1.0, 0.95, False),
        (-1.0, 2.0, False),
        (0.0, 0.8, True),
        (0.0, 1.2, False),
    ],
)
def test_clipped(advantage: float, ratio: float, out: bool) -> None:
    error = torch.tensor([0.4], dtype=torch.float64)
    old_error = error + math.log(ratio)  # ratio = exp(d_old - d)
    assert clipped(error, old_error, torch.tensor([advantage]), 0.1).tolist() == [out]


# ---- DGPO's loss


def weights_and_loss(d: Tensor, reference: Tensor, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    weight = group_weight(d, reference, advantages, beta)
    inside = torch.zeros_like(d, dtype=torch.bool)
    return weight, dgpo_loss(d, weight[:, None], advantages, inside)


def test_dgpo_loss_is_weight_times_advantage_times_error() -> None:
    d, reference, advantages = errors(0), errors(1), array(PROMPTS, GROUP, seed=2)
    _, loss = weights_and_loss(leaf(d), torch.tensor(reference), torch.tensor(advantages), 3.0)
    weight = np.array([1 / (1 + math.exp(-score)) for score in oracle_score(d, reference, advantages, 3.0)])
    exact(loss, weight[:, None] * advantages * d)


@pytest.mark.parametrize("beta", [0.5, 3.0, 20.0])
def test_the_gradient_is_the_preference_objectives_over_beta(beta: float) -> None:
    """R = mean over groups of -log sigmoid(-S_g) = mean of log(1 + exp(S_g)).

    dR/dd_pg = (1/P) sigmoid(S_p) (beta/G) A_pg, while L = mean over P G images of w A d has
    dL/dd_pg = w_p A_pg / (P G): dL/dd = dR/dd / beta. The 1/G is that of the mean over images.
    """
    d, reference, advantages = errors(0), errors(1), array(PROMPTS, GROUP, seed=2)
    given_d = leaf(d)
    _, loss = weights_and_loss(given_d, torch.tensor(reference), torch.tensor(advantages), beta)
    ours = gradient(loss.mean(), given_d)

    again = leaf(d)
    score = beta / GROUP * (torch.tensor(advantages) * (again - torch.tensor(reference))).sum(1)
    preference = -torch.nn.functional.logsigmoid(-score).mean()
    exact(ours, gradient(preference, again).numpy() / beta)
    slopes = finite_difference(lambda x: np.logaddexp(0, oracle_score(x, reference, advantages, beta)) / PROMPTS, d)
    np.testing.assert_allclose(ours.numpy(), slopes / beta, rtol=0, atol=1e-9)


def test_neither_the_weight_nor_the_reference_gets_a_gradient() -> None:
    d, reference, advantages = leaf(errors(0)), leaf(errors(1)), leaf(array(PROMPTS, GROUP, seed=2))
    weight, loss = weights_and_loss(d, reference, advantages.detach(), 3.0)
    slope_d, slope_reference = torch.autograd.grad(loss.sum(), [d, reference], allow_unused=True)
    assert slope_reference is None
    exact(slope_d, (weight[:, None] * advantages).detach().numpy())  # and no term from w's own dependence on d


def test_clipped_images_have_exactly_no_gradient_and_the_same_value() -> None:
    d, advantages = errors(0), array(PROMPTS, GROUP, seed=2)
    out = array(PROMPTS, GROUP, seed=3) > 0
    assert 0 < out.sum() < out.size
    given_d, weight = leaf(d), torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64)
    loss = dgpo_loss(given_d, weight, torch.tensor(advantages), torch.tensor(out))
    exact(loss, weight.numpy() * advantages * d)
    slope = gradient(loss.sum(), given_d).numpy()
    assert (slope[out] == 0).all()
    np.testing.assert_allclose(slope[~out], (weight.numpy() * advantages)[~out], rtol=1e-12)


def test_a_good_images_error_goes_down_and_a_bad_ones_up() -> None:
    d = leaf(np.full((1, 2), 0.5))
    _, loss = weights_and_loss(d, torch.full((1, 2), 0.5), torch.tensor([[1.0, -1.0]]), 10.0)
    downhill = -gradient(loss.mean(), d)
    assert downhill[0, 0] < 0 < downhill[0, 1]


def test_beta_changes_the_weight_but_not_the_step() -> None:
    d, reference, advantages = errors(0), torch.tensor(errors(1)), torch.tensor(array(PROMPTS, GROUP, seed=2))
    steps = []
    for beta in (1e-12, 1.0, 7.0):
        given_d = leaf(d)
        weight, loss = weights_and_loss(given_d, reference, advantages, beta)
        steps.append(gradient(loss.mean(), given_d) / weight.detach()[:, None])
        if beta < 1e-6:
            exact(weight, np.full(PROMPTS, 0.5))
    exact(steps[1], steps[0].numpy())
    exact(steps[2], steps[0].numpy())
    exact(steps[0], advantages.numpy() / (PROMPTS * GROUP))


# ---- Flow-GRPO's loss


def oracle_policy_loss(ratio: Array, advantages: Array, clip: float) -> Array:
    """Case by case: the ratio counts only up to 1 + c for good images and only down to 1 - c for bad ones."""
    effective = np.where(advantages > 0, np.minimum(ratio, 1 + clip), np.maximum(ratio, 1 - clip))
    return -advantages * effective


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_policy_loss_and_its_gradient(clip: float) -> None:
    ratio, advantages = np.exp(array(40)), array(40, seed=1)
    given_ratio = leaf(ratio)
    loss = policy_loss(given_ratio, torch.tensor(advantages), clip)
    exact(loss, oracle_policy_loss(ratio, advantages, clip))
    clipped_side = np.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    assert 5 < clipped_side.sum() < 35
    slope = gradient(loss.sum(), given_ratio).numpy()
    assert (slope[clipped_side] == 0).all()
    exact(torch.tensor(slope), np.where(clipped_side, 0, -advantages))


def test_at_ratio_one_the_loss_and_its_gradient_are_minus_the_advantage() -> None:
    advantages = np.array([2.0, -0.5, 0.0])
    log_ratio = leaf(np.zeros(3))
    loss = policy_loss(log_ratio.exp(), torch.tensor(advantages), 1e-4)
    exact(loss, -advantages)
    exact(gradient(loss.sum(), log_ratio), -advantages)


def test_kl_divergence_and_its_gradient() -> None:
    mean, reference, sd = array(2, 3, 4), array(2, 3, 4, seed=1), 0.7
    given_mean = leaf(mean)
    kl = kl_divergence(given_mean, torch.tensor(reference), sd)
    exact(kl, ((mean - reference) ** 2).reshape(2, -1).mean(1) / (2 * 0.49))
    exact(gradient(kl.sum(), given_mean), (mean - reference) / 12 / 0.49)


@quick
@given(st.permutations(range(8)))
def test_flow_grpo_treats_images_alike(order: list[int]) -> None:
    ratio, advantages = torch.tensor(np.exp(array(8))), torch.tensor(array(8, seed=1))
    loss = policy_loss(ratio, advantages, 0.2)
    assert torch.equal(policy_loss(ratio[order], advantages[order], 0.2), loss[order])
