"""Intervals over seeds, worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_bench.report.curves import missing_runs
from dgpo_bench.report.intervals import band, base_estimate, estimate, final_estimate, paired_difference
from dgpo_bench.results import Results
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast

quick = settings(max_examples=25, deadline=None, derandomize=True)
values = st.floats(-10, 10).map(lambda value: round(value, 3))


def test_one_seed_has_no_interval() -> None:
    found = estimate([0.7])
    assert (found.mean, found.low, found.high, found.count) == (0.7, None, None, 1)
    single = band(np.array([[1.0, 2.0]]))
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


def test_final_estimate_of_an_algorithm_without_runs(three_seeds: Results) -> None:
    assert final_estimate(three_seeds, "flow-grpo-fast", "score") is None
