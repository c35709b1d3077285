"""The forward-process algorithms' losses in plain float64 numpy, the identities between them, and their flow times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dgpo_plugin.algorithms import Layout, Random
from dgpo_plugin.algorithms.awm import awm_loss, log_likelihood
from dgpo_plugin.algorithms.crd import anchor_weight, crd_loss, group_offset
from dgpo_plugin.algorithms.elbo import ratio_weights, softly_clipped
from dgpo_plugin.algorithms.flow_times import noisy_times, own_steps, strata, stratified_steps
from dgpo_plugin.algorithms.forward import normalized_error
from dgpo_plugin.algorithms.nft import nft_loss
from dgpo_plugin.algorithms.ram import ram_loss

pytestmark = pytest.mark.fast

N, DIMS = 6, (3, 2)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N, *DIMS)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V, OLD, BASE, TARGET, ADVANTAGES = drawn(0), drawn(1), drawn(2), drawn(3), 2 * drawn(4, N)


def slope(losses: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), of)[0]


def exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ---- DiffusionNFT


@pytest.mark.parametrize(("mix", "sigma"), [(1.0, 0.9), (0.1, 0.4), (1.0, 0.0089)])
def test_nfts_velocity_form_is_its_x_space_form(mix: float, sigma: float) -> None:
    """As published: x+- = x - sigma v+-, held against x0, each error over its own mean size, which has a floor."""
    clean, noise = drawn(5), drawn(6)
    x, target = (1 - sigma) * clean + sigma * noise, noise - clean
    ours, theirs = V.clone().requires_grad_(), V.clone().requires_grad_()
    found = nft_loss(ours, OLD, target, ADVANTAGES, mix, sigma)
    r = (ADVANTAGES.clamp(-5, 5) / 10 + 0.5).view(-1, 1, 1)
    expected = torch.zeros(N, dtype=torch.float64)
    for share, v in ((r, mix * theirs + (1 - mix) * OLD), (1 - r, (1 + mix) * OLD - mix * theirs)):
        error = x - sigma * v - clean
        size = error.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        expected = expected + (share * error**2 / size).mean((1, 2))
    expected = 5 * expected / mix
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope(found, ours), slope(expected, theirs), rtol=1e-9, atol=1e-12)


def test_without_its_own_size_nft_is_a_policy_gradient_with_an_anchor() -> None:
    """5 (r d+ + (1 - r) d-) / mix has the gradient of 5 mix |v - o|^2 + 2 A u (v - o), with u = o - target."""
    v = V.clone().requires_grad_()
    r = ADVANTAGES / 10 + 0.5
    good, bad = ((side * v + (1 - side) * OLD - TARGET).square().mean((1, 2)) for side in (0.7, -0.7))
    plain = 5 * (r * good + (1 - r) * bad) / 0.7
    delta, u = v - OLD, OLD - TARGET
    family = 5 * 0.7 * delta.square().mean((1, 2)) + 2 * ADVANTAGES * (u * delta).mean((1, 2))
    exact(slope(plain, v), slope(family, v))


def test_an_error_of_nothing_is_divided_by_the_floor() -> None:
    v = TARGET.clone().requires_grad_()
    error = normalized_error(v, TARGET, 0.5)
    assert error.tolist() == [0] * N
    assert torch.isfinite(slope(error, v)).all()


# ---- RAM


def test_rams_loss_is_the_base_anchor_and_a_linear_reward_term() -> None:
    """|v - (f + m A (Y - o))|^2 has the gradient of |v - f|^2 + 2 m A (o - Y) v."""
    v, m = V.clone().requires_grad_(), 7.0
    found = ram_loss(v, OLD, BASE, TARGET, ADVANTAGES, m)
    pull = m * ADVANTAGES.view(-1, 1, 1)
    exact(found, (V - (BASE + pull * (TARGET - OLD))).square().mean((1, 2)))
    exact(slope(found, v), slope(((v - BASE) ** 2 + 2 * pull * (OLD - TARGET) * v).mean((1, 2)), v))


def test_the_papers_form_of_ram_is_a_weighted_matching_error() -> None:
    v, m = V.clone().requires_grad_(), 7.0
    expected = ((v - BASE) ** 2 + m * ADVANTAGES.view(-1, 1, 1) * (v - TARGET) ** 2).mean((1, 2))
    exact(slope(ram_loss(v, v, BASE, TARGET, ADVANTAGES, m), v), slope(expected, v))


# ---- AWM


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("root", lambda d: -(0.6 / 0.25) * ((d + 1e-10) ** 0.25 - 1e-10**0.25)),
        ("uniform", lambda d: -d),
        ("sigma", lambda d: -0.6 * d),
        ("sigma_squared", lambda d: -0.36 * d),
    ],
)
def test_awms_likelihoods_and_their_gradients(kind: str, by_hand: object) -> None:
    d, again = drawn(7, N).abs().requires_grad_(), drawn(7, N).abs().requires_grad_()
    found, expected = log_likelihood(d, 0.6, kind), by_hand(again)  # type: ignore[arg-type,operator]
    exact(found, expected)
    loss = awm_loss(found, ADVANTAGES)
    exact(loss, -ADVANTAGES / 5)
    exact(slope(loss, d), slope(-ADVANTAGES / 5 * expected, again))


def test_the_root_weighs_errors_the_more_the_smaller_they_are() -> None:
    d = drawn(7, N).abs().requires_grad_()
    exact(slope(-log_likelihood(d, 0.6, "root"), d), 0.6 * (d.detach() + 1e-10) ** -0.75)


# ---- V-GRPO


def test_soft_clipping_and_the_ratios_clip() -> None:
    by_hand = [3 * math.tanh(a / 3) for a in ADVANTAGES.tolist()]
    exact(softly_clipped(ADVANTAGES, 3.0), torch.tensor(by_hand, dtype=torch.float64))
    log_ratio = (0.3 * drawn(8, N)).requires_grad_()
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.9, 1.1) * ADVANTAGES)
    weights, out = ratio_weights(ratio.detach(), ADVANTAGES, 0.1)
    assert 0 < int(out.sum()) < N
    exact(weights, -slope(loss, log_ratio))  # l = -log ratio, up to a constant


# ---- CRD


def test_crds_loss_is_centered_in_the_group_and_its_means_have_no_gradient() -> None:
    rho, r, beta = drawn(9, 2, 3), drawn(10, 2, 3).sigmoid(), 1.5
    given = rho.clone().requires_grad_()
    loss = crd_loss(given, r, group_offset(given, r, beta)[:, None], beta)
    expected = [
        [5 / beta * (beta * (row[g] - np.mean(row)) - (own[g] - np.mean(own))) ** 2 for g in range(3)]
        for row, own in zip(rho.numpy(), r.numpy(), strict=True)
    ]
    exact(loss, torch.tensor(np.array(expected)))
    residual = beta * (rho - rho.mean(1, keepdim=True)) - (r - r.mean(1, keepdim=True))
    exact(slope(loss, given), 10 * residual)


def test_crds_anchor_holds_good_pictures_hardest() -> None:
    assert anchor_weight(torch.tensor([0.0, 0.5, 1.0]), 0.1).tolist() == pytest.approx([1e-4, 0.05005, 0.1])


# ---- flow times

SIGMAS = [1 - step / 14 for step in range(15)]
LAYOUT = Layout(4, 6)
IDS = torch.arange(24)


def test_awms_runs_are_those_of_its_code() -> None:
    assert [list(run) for run in strata(1, 11, 6)] == [[1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert [list(run) for run in strata(0, 11, 6)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_every_image_leaves_out_steps_of_its_own() -> None:
    times = own_steps(SIGMAS[:11], IDS, LAYOUT, 9, Random(0, 1))
    kept = {row: [t.number for t in times if t.rows is not None and row in t.rows.tolist()] for row in range(24)}
    assert all(len(set(steps)) == 9 for steps in kept.values())
    left_out = [({*range(10)} - {*steps}).pop() for steps in kept.values()]
    assert len(set(left_out)) > 5
    # A process's share draws what it would have drawn among all.
    share = own_steps(SIGMAS[:11], IDS[1::2], LAYOUT, 9, Random(0, 1))
    for whole, part in zip(times, share, strict=True):
        assert whole.rows is not None
        assert part.rows is not None
        assert [2 * row + 1 for row in part.rows.tolist()] == [row for row in whole.rows.tolist() if row % 2]


def test_rams_times_have_the_density_two_s_and_are_a_groups_own() -> None:
    layout = Layout(200, 2)
    ids = torch.arange(400)
    times = noisy_times(ids, layout, 8, Random(0, 1))
    assert len(times) == 1600
    assert all(t.rows is not None and t.rows.tolist() == [t.rows[0], t.rows[0] + 1] for t in times)
    sigmas = [time.sigma for time in times]
    assert 0 < min(sigmas) < max(sigmas) <= 1
    assert stats.kstest(sigmas, lambda s: np.asarray(s) ** 2).pvalue > 1e-3
    part = noisy_times(ids[200:], layout, 8, Random(0, 1))
    later = [time.sigma for time in times if time.rows is not None and time.rows[0] >= 200]
    assert [time.sigma for time in part] == later


def test_strata_finer_than_the_steps_take_each_about_as_often() -> None:
    counts = np.zeros(9)
    for iteration in range(30):
        steps = [SIGMAS.index(time.sigma) for time in stratified_steps(SIGMAS, 20, 9, Random(0, iteration))]
        assert steps == sorted(steps)
        counts += np.bincount(steps, minlength=9)
    assert counts.min() > 0.8 * 30 * 20 / 9
    assert counts.max() < 1.2 * 30 * 20 / 9
