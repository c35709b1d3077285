"""Times to a threshold, worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_bench.report.intervals import paired_difference, strongest_baseline
from dgpo_bench.report.thresholds import speed
from dgpo_bench.report.verdict import verdict
from dgpo_bench.results import Results
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast

quick = settings(max_examples=25, deadline=None, derandomize=True)


def test_speed_ratios_by_hand(three_seeds: Results) -> None:
    found = speed(three_seeds, "flow-grpo", "seconds")
    # Thresholds .5, .6, .7. Flow-GRPO: half way from 30 to 40 = 35; 30; half way from 30 to 40 = 35. DGPO: 10, 10, 20.
    assert [seed.threshold for seed in found.seeds] == pytest.approx([0.5, 0.6, 0.7])
    assert [seed.baseline_at for seed in found.seeds] == pytest.approx([35, 30, 35])
    assert [seed.challenger_at for seed in found.seeds] == pytest.approx([10, 10, 20])
    assert found.ratio is not None
    assert found.ratio.mean == pytest.approx((3.5 * 3 * 1.75) ** (1 / 3))
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1.75, 3.5))
    assert found.bound is None


def test_the_axis_is_the_one_asked_for(three_seeds: Results) -> None:
    found = speed(three_seeds, "flow-grpo", "denoiser_evaluations")
    assert [seed.baseline_at for seed in found.seeds] == pytest.approx([245, 210, 245])  # 7 a second


def test_a_baseline_that_went_flat_early_is_timed_at_its_own_arrival(make_results: MakeResults) -> None:
    results = make_results({("flow-grpo", 0): [0.0, 0.5, 0.5, 0.5], ("dgpo", 0): [0.0, 0.0, 0.5, 0.5]})
    found = speed(results, "flow-grpo", "seconds").ratio
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.5, None, None)  # 10 s against 20 s; by the budget it would be 1.5


def test_one_seed_short_of_the_threshold_takes_the_ratio_away(make_results: MakeResults) -> None:
    results = make_results(
        {
            ("flow-grpo", 0): [0.0, 0.5, 0.5],
            ("flow-grpo", 1): [0.0, 0.5, 0.5],
            ("dgpo", 0): [0.0, 1.0, 1.0],  # at 5 s: ratio 2
            ("dgpo", 1): [0.0, 0.4, 0.4],  # not in 20 s: below 10 / 20
        }
    )
    found = speed(results, "flow-grpo", "seconds")
    assert [seed.status for seed in found.seeds] == ["measured", "not reached"]
    assert found.seeds[1].challenger_at is None
    assert found.seeds[1].bound == pytest.approx(0.5)
    assert found.ratio is None
    assert found.bound == pytest.approx(math.sqrt(2 * 0.5))


@pytest.mark.parametrize("flat", [[0.3, 0.3, 0.3], [0.3, 0.2, 0.1]], ids=["stood still", "fell"])
def test_a_baseline_that_gained_nothing_has_no_ratio(make_results: MakeResults, flat: list[float]) -> None:
    results = make_results({("flow-grpo", 0): flat, ("dgpo", 0): [0.3, 0.5, 0.5]})
    found = speed(results, "flow-grpo", "seconds")
    assert [seed.status for seed in found.seeds] == ["undefined"]
    assert (found.ratio, found.bound) == (None, None)


def test_either_base_at_the_threshold_leaves_the_ratio_undefined(make_results: MakeResults) -> None:
    # The two bases differ, so only one of them is there at 0 s: neither a ratio of zero nor a division by zero.
    for baseline, challenger in (([0.3, 0.3, 0.3], [0.2, 0.5, 0.5]), ([0.2, 0.3, 0.3], [0.3, 0.5, 0.5])):
        found = speed(make_results({("flow-grpo", 0): baseline, ("dgpo", 0): challenger}), "flow-grpo", "seconds")
        assert [seed.status for seed in found.seeds] == ["undefined"]
        assert found.ratio is None


def test_a_lower_is_better_primary_metric(make_results: MakeResults) -> None:
    # odd = 2 - score, so the times are those of the score; the strongest has the lowest.
    curves = {
        ("flow-grpo", 0): [0.0, 0.2, 0.4],
        ("flow-grpo-fast", 0): [0.0, 0.5, 0.5],
        ("dgpo", 0): [0.0, 1.0, 1.0],
    }
    results = make_results(curves, primary="odd")
    found = speed(results, "flow-grpo", "seconds").ratio
    assert found is not None
    assert found.mean == pytest.approx(15 / 3)
    assert strongest_baseline(results) == "flow-grpo-fast"
    assert "worse" not in verdict(results)


@quick
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), min_size=1, max_size=4))
def test_identical_runs_have_ratio_one_and_no_difference(make_results: MakeResults, rises: list[list[float]]) -> None:
    curves = {(a, s): [0.0, *rise] for a in ("dgpo", "flow-grpo") for s, rise in enumerate(rises)}
    results = make_results(curves)
    ratio, difference = (
        speed(results, "flow-grpo", "seconds").ratio,
        paired_difference(results, "dgpo", "flow-grpo", "odd"),
    )
    assert ratio is not None
    assert difference is not None
    assert ratio.mean == pytest.approx(1)
    assert difference.mean == 0


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.permutations(range(4)))
def test_permuting_seeds_leaves_the_ratio_alone(make_results: MakeResults, gains: list[int], order: list[int]) -> None:
    curves = {("flow-grpo", s): [0.0, 1.0, 1.0] for s in range(4)}
    curves |= {("dgpo", s): [0.0, float(gains[s % len(gains)]), 9.0] for s in range(4)}
    ratio = speed(make_results(curves), "flow-grpo", "seconds").ratio
    permuted = speed(make_results(curves, seeds=list(order)), "flow-grpo", "seconds").ratio
    assert ratio is not None
    assert permuted is not None
    # Flow-GRPO arrives at 10 s, DGPO at 10 / gain.
    assert ratio.mean == pytest.approx(math.prod(gains[s % len(gains)] for s in range(4)) ** 0.25)
    assert (permuted.mean, permuted.low, permuted.high) == pytest.approx((ratio.mean, ratio.low, ratio.high))
