"""The tables, worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_bench.report.tables import differing_settings, flatten, metric_rows, speed_rows
from dgpo_bench.results import Results
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast


def test_speed_rows_say_what_was_not_reached(make_results: MakeResults) -> None:
    results = make_results({("flow-grpo", 0): [0.0, 0.4, 0.4], ("dgpo", 0): [0.0, 0.1, 0.1]})
    row, total = speed_rows(results, "denoiser_evaluations")
    assert (row.baseline, row.threshold, row.baseline_at, row.challenger_at) == (
        "Flow-GRPO",
        "0.400",
        "70",
        "not reached",
    )
    assert (row.ratio.value, row.ratio.note) == ("not reached", "below 0.5\u00d7")  # 10 s, or 70, of its 20 s, or 140
    assert (total.ratio.value, total.ratio.note) == ("not reached", "in 1 of 1 seeds; at most 0.5\u00d7")
    assert (row.total, total.total) == (False, True)


@pytest.mark.parametrize(("step", "shown"), [(10, "10.0 seconds"), (150, "2.50 minutes"), (5400, "1.500 hours")])
def test_a_table_of_times_keeps_to_one_unit(make_results: MakeResults, step: float, shown: str) -> None:
    results = make_results({("flow-grpo", 0): [0.0, 0.4, 0.4], ("dgpo", 0): [0.0, 0.8, 0.8]}, step=step)
    row, _ = speed_rows(results, "seconds")
    assert row.baseline_at == shown
    assert row.challenger_at.split()[1] == shown.split()[1]  # half as long, in the same unit


def test_metric_rows_by_hand(three_seeds: Results) -> None:
    (row,) = metric_rows(three_seeds, "out")
    # odd = 2 - score: base 1.9 in every seed; DGPO 1.1, 1.2, 1.1; Flow-GRPO 1.5, 1.4, 1.3; differences -.4, -.2, -.2.
    assert [(cell.value, cell.note) for cell in row.cells] == [
        ("1.900", ""),
        ("1.133", "1.100 to 1.200"),
        ("1.400", "1.300 to 1.500"),
        ("-0.267", "-0.400 to -0.200"),
    ]
    assert row.direction == "lower is better"


def test_settings_are_flattened_and_only_differences_kept() -> None:
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None, "e": "x"}) == {
        "a.b": "[1, 2]",
        "a.c": "{}",
        "d": "null",
        "e": "x",
    }
    settings: dict[str, dict[str, Any]] = {
        "one": {"a": {"same": 1, "differs": 2}},
        "two": {"a": {"same": 1, "differs": 3}, "only": True},
    }
    assert differing_settings(settings) == [("a.differs", ["2", "3"]), ("only", ["\N{EN DASH}", "true"])]
