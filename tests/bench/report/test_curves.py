"""Curves worked out by hand in the comments, not by the code under test. All data is synthetic."""

from __future__ import annotations

import numpy as np
import pytest

from dgpo_bench.report.curves import common_grid, curve, curves_on_grid, final_value, first_crossing, interpolate
from dgpo_plugin.common.errors import UserError
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast


def array(*numbers: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array(numbers, dtype=np.float64)


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
