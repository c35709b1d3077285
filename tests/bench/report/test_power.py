"""How many pictures and seeds: against simulations, and against the numbers of a textbook."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dgpo_bench.report.power import needed, paired_deviation, power_sentence, t_test_power

pytestmark = pytest.mark.fast


def test_so_many_pictures_show_the_difference_in_four_of_five() -> None:
    pictures = needed(0.03, 0.4, 0.01).pictures
    generator = np.random.default_rng(0)
    draws = generator.normal(0.03, 0.4, size=(2000, pictures))
    z = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(pictures))
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.03)  # 2,000 trials: three standard errors are .027
    assert pictures == pytest.approx(7.849 * (0.4 / 0.03) ** 2, abs=1)  # (1.960 + 0.842)^2


def test_so_many_seeds_do_and_one_fewer_does_not() -> None:
    seeds = needed(0.03, 0.4, 0.02).seeds
    assert seeds is not None
    generator = np.random.default_rng(0)
    shown = []
    for count in (seeds - 1, seeds):
        draws = generator.normal(0.03, 0.02, size=(4000, count))
        shown.append(float(np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)))
    assert shown[0] < 0.8 <= shown[1] + 0.02
    assert t_test_power(0.03, 0.02, seeds - 1) == pytest.approx(shown[0], abs=0.025)


def test_yes_and_no_have_the_spread_of_two_coins() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.random((2, 100_000)) < 0.65).astype(float)
    assert paired_deviation(0.65) == pytest.approx(np.std(first - second), rel=0.01)
    assert paired_deviation(0.65, 1.0) == 0


def test_the_ends_are_sane() -> None:
    assert needed(0.03, 0.0, 0.0).pictures == 2
    assert needed(0.03, 0.4, 0.0).seeds == 2
    assert needed(0.03, 0.4, 1.0).seeds is None
    assert needed(0.03, 0.4, 1e-4).seeds == 2
    assert "more than 1000 seeds" in power_sentence(0.03, 0.4, 1.0)
    assert "0.03" in power_sentence(0.03, 0.4, 0.01)
    for bad in ((0.0, 0.1, 0.1), (-0.1, 0.1, 0.1), (0.1, -0.1, 0.1), (0.1, 0.1, -0.1)):
        with pytest.raises(ValueError, match="above 0"):
            needed(*bad)
