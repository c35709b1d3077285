"""Advantages where some pictures have no score: means and deviations over the others, 0 for those."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms.advantages import aggregate, constant_groups, group_statistics, normalize
from dgpo_plugin.config.fields import AdvantageStd

pytestmark = pytest.mark.fast

NAN = math.nan
MODES: tuple[AdvantageStd, ...] = ("group", "iteration", "none")


def oracle(rewards: list[list[float]], mode: AdvantageStd) -> list[list[float]]:
    """The formula, picture by picture, over those that were scored."""
    everyone = [r for row in rewards for r in row if not math.isnan(r)]
    rows = []
    for row in rewards:
        scored = [r for r in row if not math.isnan(r)]
        if len(set(scored)) < 2:
            rows.append([0.0] * len(row))
            continue
        spread = 1.0 if mode == "none" else np.std(scored if mode == "group" else everyone) + 1e-4
        rows.append([0.0 if math.isnan(r) else float(np.clip((r - np.mean(scored)) / spread, -5, 5)) for r in row])
    return rows


CASES = {
    "one of four": [[1.0, NAN, 3.0, 8.0], [0.0, 4.0, 2.0, 2.0]],
    "the first of a group": [[NAN, 1.0, 2.0, 4.0]],
    "all but two": [[NAN, 1.0, NAN, 4.0]],
    "all but one": [[NAN, 7.0, NAN, NAN], [0.0, 1.0, 2.0, 3.0]],
    "all of a group": [[NAN, NAN, NAN, NAN], [0.0, 1.0, 2.0, 3.0]],
    "the others are equal": [[0.1, 0.1, NAN, 0.1], [0.0, 1.0, 2.0, 3.0]],
    "in every group": [[NAN, 1.0, 2.0, 9.0], [5.0, NAN, 6.0, 7.0], [1.0, 2.0, 3.0, NAN]],
    "an outlier that is clipped": [[NAN, 1.0] + [0.0] * 60],
    "negative rewards": [[-3.0, -1.0, NAN, -8.0]],
    "large rewards": [[1e6, 1e6 + 8, NAN, 1e6 + 2]],
    "two pictures, one of them": [[NAN, 1.0], [2.0, 3.0]],
    "none": [[1.0, 2.0, 3.0, 5.0]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_over_the_scored_pictures(case: str, mode: AdvantageStd) -> None:
    rewards = CASES[case]
    found = normalize(torch.tensor(rewards, dtype=torch.float64), mode)
    np.testing.assert_allclose(found.numpy(), oracle(rewards, mode), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_a_group_with_fewer_than_two_different_scores_is_exactly_zero(value: float, mode: AdvantageStd) -> None:
    rewards = torch.tensor([[value, NAN, value, value, value], [NAN, NAN, value, NAN, NAN], [1.0, 2.0, 3.0, 4.0, 9.0]])
    advantages = normalize(rewards, mode)
    assert (advantages[:2] == 0).all()
    assert (advantages[2] != 0).all()
    assert constant_groups(rewards).flatten().tolist() == [True, True, False]


@pytest.mark.parametrize("how", ["rewards", "advantages"])
@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_lacks_one_reward_counts_for_none(mode: AdvantageStd, how: str) -> None:
    """The same advantages as in a group without it, up to the iteration's deviation, and 0 for itself."""
    parts = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    lacking = parts.clone()
    lacking[0, 4, 1] = NAN
    found = aggregate(lacking, weights, mode, how)  # type: ignore[arg-type]
    kept = [0, 1, 2, 3, 5]
    torch.testing.assert_close(found[:, kept], aggregate(parts[:, kept], weights, mode, how))  # type: ignore[arg-type]
    assert found[0, 4] == 0


@pytest.mark.parametrize("how", ["rewards", "advantages"])
def test_nothing_scored_prefers_nothing(how: str) -> None:
    parts = torch.full((2, 4, 3), NAN)
    assert not aggregate(parts, torch.ones(3), "iteration", how).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 3])
def test_where_all_are_scored_the_bits_are_torchs_own(columns: int) -> None:
    """Of one reward, and of a column of several, whose memory is not contiguous."""
    rewards: Tensor = torch.rand(8, 24, columns, generator=torch.Generator().manual_seed(1)).unbind(2)[-1]
    mean, std = group_statistics(rewards)
    assert torch.equal(mean, rewards.mean(1, keepdim=True))
    assert torch.equal(std, rewards.std(1, keepdim=True, correction=0))
    expected = ((rewards - mean) / (rewards.std(correction=0) + 1e-4)).clamp(-5, 5)
    assert torch.equal(normalize(rewards, "iteration"), expected)
