"""Crossings and ratios worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgpo_bench.cell import START
from dgpo_bench.records import BASE
from dgpo_bench.report.comparison import comparison_of
from dgpo_bench.report.cost_tables import speed_tables
from dgpo_bench.report.measures import value
from dgpo_bench.report.speed import AXES, Crossing, axes_of, crossing, ratio, speed
from dgpo_bench.report.verdict import speed_sentence
from tests.bench.report.synthetic import World, synthetic

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.3, 0.6, 0.7], Crossing(10, 20)),
        ([0.1, 0.6, 0.3, 0.7, 0.8], Crossing(20, 30)),  # what does not hold is none
        ([0.1, 0.3, 0.4, 0.6], Crossing(20, math.inf)),  # met at the last alone: nothing to hold at
        ([0.1, 0.2, 0.3, 0.4], Crossing(30, math.inf)),
        ([0.6, 0.7], Crossing(0, 0)),
        ([0.6, 0.3, 0.7, 0.7], Crossing(10, 20)),
        ([0.5, 0.5], Crossing(0, 0)),
    ],
)
def test_a_crossing_lies_between_two_evaluations_and_holds_at_the_next(values: list[float], expected: Crossing) -> None:
    assert crossing([10.0 * i for i in range(len(values))], values, 0.5) == expected


def test_a_ratio_is_known_between_two_bounds() -> None:
    # 20 to 30 over 10 to 20: at least 20 / 20, at most 30 / 10. The second seed: 40 to 50 over 10 to 20: 2 to 5.
    found = ratio([Crossing(10, 20), Crossing(10, 20)], [Crossing(20, 30), Crossing(40, 50)])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((math.sqrt(1 * 2), math.sqrt(3 * 5)))
    assert found.runs is None


def test_what_was_not_reached_enters_as_a_bound() -> None:
    late, reached = Crossing(40, math.inf), Crossing(10, 20)
    found = ratio([late], [reached])
    assert found is not None
    assert (found.low, found.high) == (0, 0.5)  # it needs more than 40, the baseline at most 20
    found = ratio([reached], [late])
    assert found is not None
    assert (found.low, found.high) == (2, math.inf)
    pooled = ratio([reached, reached], [late, Crossing(20, 40)])
    assert pooled is not None
    assert (pooled.low, pooled.high) == (pytest.approx(math.sqrt(2 * 1)), math.inf)
    assert ratio([late], [late]) is None
    assert ratio([Crossing(0, 0)], [reached]) is None
    assert ratio([], []) is None


def test_five_seeds_have_an_interval_wider_than_the_bounds() -> None:
    ours = [Crossing(10, 11)] * 5
    theirs = [Crossing(20 + i, 21 + i) for i in range(5)]
    found = ratio(ours, theirs)
    assert found is not None
    assert found.runs is not None
    assert found.runs.low < found.low < found.high < found.runs.high
    without = ratio([*ours[:4], Crossing(50, math.inf)], theirs)
    assert without is not None
    assert without.runs is None


RISING = [0.4, 0.5, 0.6, 0.8, 0.8]
SLOW = [0.4, 0.4, 0.5, 0.6, 0.6]


def test_thresholds_are_the_tasks_and_ratios_are_on_every_axis() -> None:
    # .45: ours between 0 and 10, theirs between 10 and 20 s; .55: 10 to 20 and 20 to 30; .7: 20 to 30, never.
    comparison = synthetic(World({(name, s): c for name, c in (("ours", RISING), ("theirs", SLOW)) for s in (0, 1)}))
    assert axes_of(comparison) == list(AXES)
    found = speed(comparison, "theirs", "total_seconds")
    assert found.defined
    assert [each.threshold for each in found.thresholds] == [0.45, 0.55, 0.7]
    assert found.thresholds[0].challenger == {0: Crossing(0, 10), 1: Crossing(0, 10)}
    bounds = [(each.ratio.low, each.ratio.high) for each in found.thresholds if each.ratio is not None]
    assert bounds == [(1, math.inf), (pytest.approx(1), pytest.approx(3)), (pytest.approx(40 / 30), math.inf)]
    for axis, unit in (("denoiser_evaluations", 7), ("flops", 1e9), ("images_scored", 0.4), ("steps", 0.2)):
        assert speed(comparison, "theirs", axis).thresholds[1].challenger[0] == Crossing(10 * unit, 20 * unit)


@pytest.mark.parametrize("end", [0.4, 0.41, 0.3])
def test_without_a_gain_of_the_baseline_there_is_no_ratio(end: float) -> None:
    """Its own noise is .2, so a gain of .01 over twelve prompts of two pictures has a bound below 0."""
    flat = [0.3, 0.46, 0.46, end]
    curves = {("ours", 0): [0.3, 0.5, 0.6, 0.6], ("theirs", 0): flat}
    found = speed(synthetic(World(curves, own=0.2)), "theirs", "denoiser_evaluations")
    assert not found.defined
    assert found.baseline_gain is not None
    assert found.baseline_gain.low is not None
    assert found.baseline_gain.low <= 0
    assert found.challenger_gain is not None
    assert all(each.ratio is None for each in found.thresholds)


def test_where_less_is_better_the_signs_turn() -> None:
    world = World({("ours", 0): [0.4, 0.3, 0.2, 0.1], ("theirs", 0): [0.4, 0.35, 0.3, 0.3]})
    plain = synthetic(world)
    lower = plain.results.metrics["accuracy"].model_copy(update={"better": "lower"})
    task = plain.results.task.model_copy(update={"thresholds": [0.32]})
    comparison = synthetic(world, metrics={**plain.results.metrics, "accuracy": lower}, task=task)
    found = speed(comparison, "theirs", "total_seconds")
    assert found.defined
    assert found.thresholds[0].challenger == {0: Crossing(0, 10)}
    assert found.thresholds[0].baseline == {0: Crossing(10, 20)}


def test_an_axis_that_some_cell_did_not_measure_is_left_out() -> None:
    comparison = synthetic(World({("ours", 0): RISING, ("theirs", 0): SLOW}))
    cells = [
        cell.model_copy(update={"checkpoints": [p.model_copy(update={"flops": None}) for p in cell.checkpoints]})
        for cell in comparison.results.cells
    ]
    assert "flops" not in axes_of(synthetic(World({("ours", 0): RISING, ("theirs", 0): SLOW}), cells=cells))


def test_thresholds_that_both_reached_before_the_first_evaluation_are_not_called_unreached() -> None:
    curves = {("ours", 0): [0.4, 0.6, 0.6], ("theirs", 0): [0.4, 0.6, 0.6]}
    comparison = synthetic(World(curves))
    found = speed(comparison, "theirs", "flops")
    assert [each.ratio for each in found.thresholds] == [None, None, None]
    notes = [row.cells[0].note for row in speed_tables(comparison)[0].rows]
    assert notes == [*["evaluations are too far apart to tell"] * 2, "neither reached it"]
    assert "or the evaluations are too far apart to tell" in speed_sentence(comparison, "theirs")


def test_adapters_that_were_made_elsewhere_have_no_speed() -> None:
    curves = {("ours", 0): [0.4, 0.6], ("theirs", 0): [0.4, 0.5]}
    comparison = synthetic(World(curves, step=0.0))
    cells = [
        cell.model_copy(update={"checkpoints": [START, START.model_copy(update={"flops": None})]})
        for cell in comparison.results.cells
    ]
    comparison = synthetic(World(curves), cells=cells)
    assert axes_of(comparison) == []
    assert speed_tables(comparison) == []
    assert speed_sentence(comparison, "theirs") == ""


def test_whether_the_base_is_there_is_asked_of_the_pictures_that_crossings_are_read_from() -> None:
    """The base has .4 on the curves' prompts and .6 on the one prompt that no checkpoint measures."""
    comparison = synthetic(World({("ours", 0): RISING, ("theirs", 0): SLOW}, tags={"one": 6}))
    pictures = comparison.pictures
    rest = (pictures.prompt == 0) & (pictures.set == "held-out")
    scores = np.where(rest & (pictures.entry == "base"), 2.0, pictures.metrics["accuracy"])
    pictures = replace(pictures, metrics={**pictures.metrics, "accuracy": scores})
    between = rest & (pictures.entry != "base") & (pictures.checkpoint < len(RISING) - 1)
    without = comparison_of(comparison.results, pictures.where(~between), Path("made-up"))
    assert value(without, BASE, "in_domain", "accuracy").mean > 0.55
    assert [each.base_there for each in speed(without, "theirs", "flops").thresholds] == [False, False, False]
