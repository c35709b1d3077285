"""Advantages against the formula, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dgpo_plugin.algorithms.advantages import aggregate, normalize
from dgpo_plugin.config.fields import AdvantageStd

pytestmark = pytest.mark.fast

quick = settings(max_examples=50, deadline=None, derandomize=True)
MODES: tuple[AdvantageStd, ...] = ("group", "iteration", "none")
modes = st.sampled_from(MODES)
Array = NDArray[np.float64]

# Rounded, so that no two rewards differ by mere rounding errors, which + 1e-4 would not hide.
rewards_of = st.floats(-10, 10).map(lambda value: round(value, 2))
matrices = st.integers(1, 4).flatmap(
    lambda p: st.integers(2, 6).flatmap(
        lambda g: st.lists(st.lists(rewards_of, min_size=g, max_size=g), min_size=p, max_size=p).map(np.array)
    )
)


def advantages_of(rewards: Array, mode: AdvantageStd, limit: float = 5.0) -> Array:
    result: Array = normalize(torch.tensor(rewards, dtype=torch.float64), mode, limit).numpy()
    return result


def oracle(rewards: Array, mode: AdvantageStd, limit: float = 5.0) -> Array:
    """docs/architecture.md, section 4, group by group; numpy's std is the population's."""
    rows = []
    for group in rewards:
        divisor = {"group": np.std(group) + 1e-4, "iteration": np.std(rewards) + 1e-4, "none": 1.0}[mode]
        rows.append([min(max((r - np.mean(group)) / divisor, -limit), limit) for r in group])
    return np.array(rows)


@quick
@given(matrices, modes)
def test_matches_the_formula(rewards: Array, mode: AdvantageStd) -> None:
    np.testing.assert_allclose(advantages_of(rewards, mode), oracle(rewards, mode), rtol=1e-9, atol=1e-9)


def test_in_numbers() -> None:
    rewards = np.array([[1.0, 3.0], [0.0, 4.0]])
    np.testing.assert_allclose(advantages_of(rewards, "group"), [[-1 / 1.0001, 1 / 1.0001], [-2 / 2.0001, 2 / 2.0001]])
    spread = np.sqrt((1 + 1 + 4 + 4) / 4) + 1e-4  # about the common mean 2
    np.testing.assert_allclose(advantages_of(rewards, "iteration"), np.array([[-1, 1], [-2, 2]]) / spread)


@quick
@given(matrices, modes, st.randoms(use_true_random=False))
def test_permuting_images_permutes_their_advantages(rewards: Array, mode: AdvantageStd, random: object) -> None:
    order = list(range(rewards.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        advantages_of(rewards[:, order], mode), advantages_of(rewards, mode)[:, order], rtol=1e-9, atol=1e-9
    )


@quick
@given(matrices, st.data())
def test_a_constant_added_to_one_group_changes_nothing_with_the_groups_std(rewards: Array, data: st.DataObject) -> None:
    offsets = np.array([data.draw(rewards_of) for _ in rewards])[:, None]
    shifted, before = advantages_of(rewards + offsets, "group"), advantages_of(rewards, "group")
    np.testing.assert_allclose(shifted, before, rtol=1e-7, atol=1e-7)


@quick
@given(matrices, modes, rewards_of)
def test_a_constant_added_to_all_groups_changes_nothing(rewards: Array, mode: AdvantageStd, offset: float) -> None:
    np.testing.assert_allclose(
        advantages_of(rewards + offset, mode), advantages_of(rewards, mode), rtol=1e-7, atol=1e-7
    )


@quick
@given(matrices, st.data())
def test_with_the_iterations_std_a_constant_added_to_one_group_only_rescales(
    rewards: Array, data: st.DataObject
) -> None:
    """The iteration's std sees distances between groups, the numerators do not: one common factor."""
    offsets = np.array([data.draw(rewards_of) for _ in rewards])[:, None]
    before = advantages_of(rewards, "iteration", limit=1e9)
    after = advantages_of(rewards + offsets, "iteration", limit=1e9)
    factor = (np.std(rewards) + 1e-4) / (np.std(rewards + offsets) + 1e-4)
    np.testing.assert_allclose(after, before * factor, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_constant_groups_are_exactly_zero(mode: AdvantageStd, kind: torch.dtype) -> None:
    for size in range(2, 33):  # the mean of equal numbers is often not that number, in the last bit
        varied = torch.linspace(0, 1, size, dtype=kind)
        rewards = torch.stack([torch.full((size,), value, dtype=kind) for value in (0.1, 1 / 3, 1e6)] + [varied])
        advantages = normalize(rewards, mode)
        assert (advantages[:3] == 0).all()
        assert (advantages[3] != 0).any()


@quick
@given(matrices, modes, st.sampled_from([1.0, 5.0]))
def test_bounded(rewards: Array, mode: AdvantageStd, limit: float) -> None:
    assert np.abs(advantages_of(rewards, mode, limit)).max() <= limit


def test_the_bound_is_five_and_is_reached() -> None:
    outlier = np.array([[1.0] + [0.0] * 49])  # (1 - 1/50) / 0.14 = 7 standard deviations
    for mode in MODES:
        rewards = torch.tensor(outlier) * (7 if mode == "none" else 1)
        assert normalize(rewards, mode).max() == 5
        assert normalize(-rewards, mode).min() == -5
    assert advantages_of(outlier, "group", limit=10).max() == pytest.approx(0.98 / (0.14 + 1e-4))


@quick
@given(matrices, modes)
def test_mean_zero_in_every_group_unless_clipped(rewards: Array, mode: AdvantageStd) -> None:
    advantages = advantages_of(rewards, mode)
    whole = (np.abs(advantages) < 5).all(1)
    np.testing.assert_allclose(advantages[whole].mean(1), 0, atol=1e-9)


@quick
@given(matrices)
def test_better_images_have_larger_advantages(rewards: Array) -> None:
    for mode in MODES:
        for group, advantages in zip(rewards, advantages_of(rewards, mode), strict=True):
            assert (np.diff(advantages[np.argsort(group, kind="stable")]) >= 0).all()


# ---- several rewards


@quick
@given(matrices, modes)
def test_a_single_reward_of_weight_one_is_itself(rewards: Array, mode: AdvantageStd) -> None:
    parts = torch.tensor(rewards)[..., None]
    both = aggregate(parts, torch.ones(1, dtype=torch.float64), mode, "rewards")
    np.testing.assert_array_equal(both.numpy(), advantages_of(rewards, mode))


@quick
@given(matrices, modes, st.integers(0, 2**31), st.floats(-2, 2), st.floats(0.1, 3))
def test_decoupled_advantages_match_the_formula(
    rewards: Array, mode: AdvantageStd, seed: int, first: float, second: float
) -> None:
    """GDPO: each reward's own advantage, unclipped; their weighted sum over its spread in the iteration, if any."""
    other = np.random.default_rng(seed).normal(size=rewards.shape).round(2) * 1000
    total = first * oracle(rewards, mode, np.inf) + second * oracle(other, mode, np.inf)
    expected = np.clip(total / (1 if mode == "none" else np.std(total) + 1e-4), -5, 5)
    parts = torch.tensor(np.stack([rewards, other], axis=-1))
    ours = aggregate(parts, torch.tensor([first, second], dtype=torch.float64), mode, "advantages")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_a_rewards_scale_does_not_drown_another_in_decoupled_advantages() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)
    plain = aggregate(torch.stack([small, large], -1), weights, "group", "advantages")
    scaled = aggregate(torch.stack([small, 1000 * large], -1), weights, "group", "advantages")
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)
    summed = aggregate(torch.stack([small, 1000 * large], -1), weights, "group", "rewards")
    torch.testing.assert_close(summed, normalize(large, "group"), rtol=1e-2, atol=1e-2)


def test_rewards_that_all_are_constant_prefer_nothing() -> None:
    parts = torch.full((2, 4, 3), 0.1)
    for how in ("rewards", "advantages"):
        assert not aggregate(parts, torch.tensor([1.0, 0.3, 2.0]), "group", how).any()
