"""Expectations are worked out by hand in the comments, not by the code under test. All data is synthetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_bench.results import Metric, Results
from dgpo_bench.statistics import (
    band,
    base_estimate,
    common_grid,
    curve,
    curves_on_grid,
    estimate,
    final_estimate,
    final_value,
    first_crossing,
    format_number,
    format_ratio,
    interpolate,
    missing_runs,
    paired_difference,
    speed,
    strongest_baseline,
    verdict,
)
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast

MakeResults = Callable[..., Results]
quick = settings(max_examples=25, deadline=None, derandomize=True)
values = st.floats(-10, 10).map(lambda value: round(value, 3))


def array(*numbers: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array(numbers, dtype=np.float64)


# ---- curves


def test_the_grid_stops_where_the_shortest_run_does() -> None:
    grid = common_grid([(array(0, 5, 30), array(0, 0, 0)), (array(0, 20), array(0, 0))], points=5)
    assert grid.tolist() == [0, 5, 10, 15, 20]


def test_runs_that_share_no_range_have_an_empty_grid() -> None:
    assert len(common_grid([(array(0, 1), array(0, 0)), (array(1, 2), array(0, 0))])) == 0
    assert len(common_grid([])) == 0


def test_interpolation_is_linear_and_never_extrapolates() -> None:
    assert interpolate(array(0, 10), array(1, 3), array(0, 2.5, 10)).tolist() == [1, 1.5, 3]
    for outside in (-0.1, 10.1):
        with pytest.raises(ValueError, match="leaves the range"):
            interpolate(array(0, 10), array(1, 3), array(outside))


def test_curves_of_runs_with_different_ends_meet_on_one_grid(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 1.0], ("dgpo", 1): [0.0, 0.5, 9.0]})
    grid, found = curves_on_grid(results.runs, "score", "seconds", points=3)
    assert grid.tolist() == [0, 5, 10]
    assert found.tolist() == [[0, 0.5, 1], [0, 0.25, 0.5]]
    assert curves_on_grid(results.runs, "score", "denoiser_evaluations", points=3)[0].tolist() == [0, 35, 70]


def test_time_that_goes_backwards_is_refused(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 3): [0.0, 1.0]}, step=-1)
    with pytest.raises(UserError, match="dgpo seed 3: seconds goes backwards"):
        curve(results.runs[0], "score", "seconds")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.1, 0.2, 0.4, 0.8], 0.6), ([0.1, 0.4], 0.4), ([0.1], None)],
    ids=["last two", "the base never counts", "nothing trained"],
)
def test_final_value(make_results: MakeResults, scores: list[float], expected: float | None) -> None:
    assert final_value(make_results({("dgpo", 0): scores}).runs[0], "score") == (expected and pytest.approx(expected))


# ---- intervals


def test_one_seed_has_no_interval() -> None:
    found = estimate([0.7])
    assert (found.mean, found.low, found.high, found.count) == (0.7, None, None, 1)
    single = band(array(1, 2)[None])
    assert single.mean.tolist() == [1, 2]
    assert (single.low, single.high) == (None, None)


def test_three_seeds_give_the_whole_range() -> None:
    # All three draws alike: (1/3)^3 = 3.7 %, which is more than 2.5 %, so both percentiles are the extremes.
    found = estimate([0.2, 0.9, 0.4])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.2, 0.9))


def test_the_interval_narrows_as_the_normal_one_would() -> None:
    # Fifty zeros and fifty ones: the mean's standard error is 0.05, so 95 % reach about 0.5 -+ 1.96 * 0.05.
    found = estimate([0.0, 1.0] * 50)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.402, abs=0.011)
    assert found.high == pytest.approx(0.598, abs=0.011)


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="no seed"):
        band(np.empty((0, 3)))


@quick
@given(st.lists(values, min_size=2, max_size=8), st.randoms())
def test_the_order_of_the_seeds_changes_nothing(numbers: list[float], random: object) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert estimate(shuffled) == estimate(numbers)


@quick
@given(st.lists(values, min_size=2, max_size=8), values)
def test_intervals_stay_inside_the_data_and_move_with_it(numbers: list[float], shift: float) -> None:
    found, moved = estimate(numbers), estimate([number + shift for number in numbers])
    assert found.low is not None
    assert found.high is not None
    assert min(numbers) <= found.low <= found.high <= max(numbers)
    assert moved.mean == pytest.approx(found.mean + shift, abs=1e-9)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift))


def test_a_base_that_every_seed_measures_alike_has_no_zero_width_interval(make_results: MakeResults) -> None:
    same = make_results({("dgpo", 0): [0.1, 0.5], ("dgpo", 1): [0.1, 0.6]})
    found = base_estimate(same, "score")
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.1, None, None)
    # Seed 0 is averaged over both algorithms first: (0.1 + 0.3) / 2 = 0.2; then over seeds: (0.2 + 0.4) / 2.
    different = make_results({("dgpo", 0): [0.1], ("flow-grpo", 0): [0.3], ("dgpo", 1): [0.4]})
    found = base_estimate(different, "score")
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))


def test_paired_difference(three_seeds: Results) -> None:
    # Finals: DGPO .9, .8, .9; Flow-GRPO .5, .6, .7. Differences .4, .2, .2.
    found = paired_difference(three_seeds, "dgpo", "flow-grpo", "score")
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.8 / 3, 0.2, 0.4))
    opposite = paired_difference(three_seeds, "dgpo", "flow-grpo", "odd")
    assert opposite is not None
    assert opposite.mean == pytest.approx(-0.8 / 3)


def test_a_difference_uses_only_the_seeds_that_both_finished(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.5], ("dgpo", 1): [0.0, 99.0], ("flow-grpo", 0): [0.0, 0.4]})
    found = paired_difference(results, "dgpo", "flow-grpo", "score")
    assert found is not None
    assert (found.mean, found.count) == pytest.approx((0.1, 1))
    assert paired_difference(results, "dgpo", "flow-grpo-fast", "score") is None
    assert missing_runs(results) == [("flow-grpo", 1)]


# ---- time to a threshold


@pytest.mark.parametrize(
    ("scores", "threshold", "expected"),
    [
        ([0.0, 0.2, 0.6], 0.4, 15.0),  # half way between 10 and 20
        ([0.0, 0.2, 0.6], 0.1, 5.0),  # between the base and the first evaluation
        ([0.0, 0.2, 0.6], 0.6, 20.0),  # exactly the last point
        ([0.0, 0.2, 0.6], 0.61, None),
        ([0.5, 0.2, 0.6], 0.4, 0.0),  # the base is there already
        ([0.0, 0.8, 0.0, 0.8], 0.4, 5.0),  # the first crossing, though it falls again
    ],
)
def test_first_crossing(scores: list[float], threshold: float, expected: float | None) -> None:
    x = array(*(10.0 * i for i in range(len(scores))))
    assert first_crossing(x, array(*scores), threshold, "higher") == (
        expected if expected is None else pytest.approx(expected)
    )
    mirrored = first_crossing(x, -array(*scores), -threshold, "lower")
    assert mirrored == (expected if expected is None else pytest.approx(expected))


def test_a_repeated_x_is_no_division_by_zero() -> None:
    assert first_crossing(array(0, 10, 10), array(0.0, 0.1, 0.5), 0.3, "higher") == 10


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


# ---- the verdict


def test_numbers_show_the_digits_that_matter() -> None:
    numbers = (0, 0.004123, -0.0712, 0.5, 22.344, 1234.56)
    assert [format_number(n) for n in numbers] == ["0", "0.0041", "-0.071", "0.500", "22.34", "1234.6"]
    assert [format_ratio(n) for n in (0.333, 1, 6.25, 19.4)] == ["0.33", "1.0", "6.2", "19"]


def test_verdict_of_a_plain_win(three_seeds: Results) -> None:
    # The geometric mean of 3.5, 3, 1.75 (a hair less in floats) is 2.64; the finals are 2.6 / 3 and 1.8 / 3.
    assert verdict(three_seeds) == (
        "DGPO reached the final score of Flow-GRPO with 2.6x fewer denoiser evaluations "
        "(95 % interval 1.7 to 3.5, 3 seeds) "
        "and ended at 0.867 against 0.600 (difference 0.267, 0.200 to 0.400)."
    )


def test_verdict_of_one_seed_slower_and_worse(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.1, 0.5, 0.1], ("flow-grpo", 0): [0.0, 0.4, 0.4, 0.4]})
    # Flow-GRPO at 10 s, DGPO three quarters of the way from 10 to 20: 17.5 s. Finals .3 and .4.
    assert verdict(results) == (
        "DGPO took 1.8x as many denoiser evaluations to reach the final score of Flow-GRPO (one seed, no interval) "
        "and ended worse, at 0.300 against 0.400 (difference -0.100, one seed, no interval)."
    )


def test_verdict_not_reached(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.1, 0.1], ("flow-grpo", 0): [0.0, 0.4, 0.4]})
    assert "DGPO did not reach the final score of Flow-GRPO in its one seed (a speed ratio of at most 0.5x)" in verdict(
        results
    )
    assert "fewer" not in verdict(results)


def test_verdict_says_when_nothing_is_clear(make_results: MakeResults) -> None:
    results = make_results(
        {
            ("dgpo", 0): [0.0, 0.8, 0.8],
            ("dgpo", 1): [0.0, 0.4, 0.4],
            ("flow-grpo", 0): [0.0, 0.4, 0.4],
            ("flow-grpo", 1): [0.0, 0.4, 0.4],
        }
    )
    assert "1.0 to 2.0, 2 seeds: no clear difference" in verdict(results)  # ratios 2 and 1
    assert "ended, not clearly different, at 0.600 against 0.400 (difference 0.200, 0 to 0.400)" in verdict(results)


def test_verdict_names_the_strongest_baseline_first(make_results: MakeResults) -> None:
    curves = {
        ("dgpo", 0): [0.0, 0.9, 0.9],
        ("flow-grpo", 0): [0.0, 0.3, 0.3],
        ("flow-grpo-fast", 0): [0.0, 0.6, 0.6],
    }
    text = verdict(make_results(curves))
    assert text.startswith("DGPO reached the final score of Flow-GRPO-Fast, the strongest baseline, with 1.5x fewer")
    assert "; it reached that of Flow-GRPO with 3.0x fewer" in text


def test_verdict_when_the_baseline_gained_nothing(make_results: MakeResults) -> None:
    results = make_results({("flow-grpo", 0): [0.3, 0.3], ("dgpo", 0): [0.3, 0.5]})
    assert "no speed ratio to Flow-GRPO because the untrained base already met the final score" in verdict(results)


def test_verdict_without_dgpo_or_without_another(make_results: MakeResults) -> None:
    assert verdict(make_results({("flow-grpo", 0): [0.0, 0.4]})) == (
        "There is no finished DGPO run, so nothing to compare with Flow-GRPO."
    )
    assert verdict(make_results({("dgpo", 0): [0.1, 0.4]})) == (
        "DGPO ended at score 0.400 from a base at 0.100 (one seed, no interval) "
        "but there is no finished run of another algorithm to compare it with."
    )


def test_verdict_of_an_incomplete_comparison(make_results: MakeResults) -> None:
    curves = {("dgpo", 0): [0.0, 0.5], ("dgpo", 1): [0.0, 0.5], ("flow-grpo", 0): [0.0, 0.4]}
    assert verdict(make_results(curves)).startswith("Incomplete comparison (3 of 4 runs): DGPO reached")
    assert verdict(make_results(curves, runs=[], complete=False)).startswith(
        "Incomplete comparison (0 of 4 runs): there is"
    )


def test_runs_of_different_seeds_are_not_compared(make_results: MakeResults) -> None:
    assert "no finished seed" in verdict(make_results({("dgpo", 0): [0.0, 0.5], ("flow-grpo", 1): [0.0, 0.4]}))


def test_an_unusable_primary_metric_is_the_users_to_mend(make_results: MakeResults) -> None:
    with pytest.raises(UserError, match="'speed' is not among the metrics"):
        verdict(make_results({("dgpo", 0): [0.0, 0.5]}, primary="speed"))
    neutral = {"score": Metric(label="Score", domain="in", better="none", description="")}
    with pytest.raises(UserError, match="no better direction"):
        verdict(make_results({("dgpo", 0): [0.0, 0.5]}, metrics=neutral))


def test_final_estimate_of_an_algorithm_without_runs(three_seeds: Results) -> None:
    assert final_estimate(three_seeds, "flow-grpo-fast", "score") is None
