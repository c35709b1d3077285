"""Intervals against simulations with a known truth, and against formulas written out in float64. No model here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from dgpo_bench.report.intervals import (
    Interval,
    estimate,
    headline_prompts,
    new_prompts,
    new_run,
    probability_of_improvement,
)

pytestmark = pytest.mark.fast

TAGS = ["one"] * 30 + ["two"] * 20 + ["three"] * 10


def coverage(tags: list[str], trials: int = 1000) -> float:
    """How often the interval holds the truth, where tags differ in mean and in spread."""
    generator = np.random.default_rng(1)
    kinds = {tag: i for i, tag in enumerate(dict.fromkeys(tags))}
    means = np.array([0.1 * kinds[tag] for tag in tags])
    spreads = np.array([0.2 + 0.1 * kinds[tag] for tag in tags])
    held = 0
    for _ in range(trials):
        found = new_prompts(means + spreads * generator.normal(size=len(tags)), tags)
        assert found is not None
        held += found.low <= means.mean() <= found.high
    return held / trials


def test_the_interval_over_prompts_holds_the_truth_as_often_as_it_says() -> None:
    assert 0.93 <= coverage(TAGS) <= 0.97  # 1,000 trials: two standard errors are .014


def test_small_tags_are_not_taken_for_certain() -> None:
    """Thirty tags of two: drawing two of two would make the interval 1.4 times too narrow, and hold in .83."""
    assert 0.91 <= coverage([f"tag {i // 2}" for i in range(60)]) <= 0.97
    assert 0.91 <= coverage([f"tag {i % 3}" if i < 30 else f"alone {i}" for i in range(60)], 300) <= 0.99


def test_the_width_is_that_of_the_stratified_formula() -> None:
    values = np.random.default_rng(0).normal(size=len(TAGS))
    variance = sum(
        (TAGS.count(tag) / len(TAGS)) ** 2
        * np.var([v for v, of in zip(values, TAGS, strict=True) if of == tag], ddof=1)
        / TAGS.count(tag)
        for tag in set(TAGS)
    )
    found = new_prompts(values, TAGS)
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.05)


def test_what_differs_between_tags_alone_is_no_uncertainty() -> None:
    values = np.array([1.0 if tag == "one" else 0.0 for tag in TAGS])
    found = new_prompts(values, TAGS)
    assert found is not None
    assert found.high - found.low < 1e-12
    assert new_prompts(np.array([1.0]), ["one"]) is None
    few = np.full(7, 0.3)  # three prompts that agree would else be "better", for sure
    assert new_prompts(few, ["one"] * 7) is None
    assert new_prompts(np.full(8, 0.3), ["one"] * 8) is not None


def test_a_new_run_is_a_t_interval_from_five_seeds_on() -> None:
    points = [0.1, 0.2, 0.4, 0.2, 0.3]
    expected = stats.ttest_1samp(points, 0).confidence_interval(0.95)
    found = new_run(points)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert new_run(points[:4]) is None


def test_an_estimate_has_both_and_the_points() -> None:
    values = np.random.default_rng(0).normal(size=(5, len(TAGS)))
    found = estimate(values, TAGS)
    assert found.points == pytest.approx(values.mean(axis=1))
    assert found.mean == pytest.approx(values.mean())
    assert found.prompts == new_prompts(values.mean(axis=0), TAGS)
    assert found.runs == new_run(values.mean(axis=1))
    assert found.low == min(found.prompts.low, found.runs.low)
    assert found.reversed().mean == -found.mean
    assert found.reversed().runs == Interval(-found.runs.high, -found.runs.low)
    assert estimate(values[:3], TAGS).runs is None


@pytest.mark.parametrize("values", [np.empty((0, 3)), np.empty((2, 0)), np.array([[0.0, np.nan, 1.0]])])
def test_an_estimate_of_nothing_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="seeds x prompts"):
        estimate(values, ["a"] * values.shape[1])


def test_pairing_takes_away_what_prompts_have_in_common() -> None:
    generator = np.random.default_rng(0)
    common, own = generator.normal(size=(1, 60)), 0.05 * generator.normal(size=(2, 3, 60))
    first, second = 0.1 + common + own[0], common + own[1]
    paired, alone = estimate(first - second, TAGS), estimate(first, TAGS)
    assert paired.prompts is not None
    assert alone.prompts is not None
    assert paired.prompts.high - paired.prompts.low < 0.2 * (alone.prompts.high - alone.prompts.low)
    assert paired.prompts.low > 0


def test_tags_count_for_the_headline_from_a_number_on() -> None:
    assert headline_prompts(["a", "b", "a"], 2).tolist() == [True, False, True]
    assert headline_prompts(["a", "b", "a"], 1).all()
    assert not headline_prompts(["a", "b", "a"], 3).any()


def test_probability_of_improvement_is_mann_whitneys() -> None:
    first, second = np.array([0.7, 0.8, 0.9]), np.array([0.6, 0.8, 0.75, 0.95])
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(first, second)]
    other = (np.array([1.0, 2.0]), np.array([0.0, 0.5]))
    mean, interval = probability_of_improvement([(first, second), other])
    u = stats.mannwhitneyu(first, second).statistic / 12
    assert u == pytest.approx(np.mean(pairs))
    assert mean == pytest.approx((u + 1) / 2)  # worlds weigh alike
    assert interval is not None
    assert interval.low <= mean <= interval.high <= 1
    assert probability_of_improvement([other]) == (1.0, Interval(1.0, 1.0))
    assert probability_of_improvement([(first[:1], second)])[1] is None
    with pytest.raises(ValueError, match="no runs"):
        probability_of_improvement([])
