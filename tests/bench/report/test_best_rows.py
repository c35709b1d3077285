"""The best checkpoint beside the last one in tables, figures and page: rows of made-up comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_bench.records import BestCheckpoint, Results, write_record
from dgpo_bench.report.comparison import Comparison
from dgpo_bench.report.figures import ends_figure
from dgpo_bench.report.page import write_report
from dgpo_bench.report.table import Table
from dgpo_bench.report.tables import ends_table, gains_table
from tests.bench.report.synthetic import World, records, synthetic, write_synthetic

pytestmark = pytest.mark.fast

CURVES = {("ours", s): [0.4, 0.6 + 0.02 * s, 0.5] for s in (0, 1)} | {("theirs", s): [0.4, 0.45, 0.55] for s in (0, 1)}
LABEL = "OURS, best on validation"


def with_best(results: Results, entry: str, checkpoints: dict[int, int]) -> Results:
    """The records with a best checkpoint of some cells of one entry."""
    cells = [
        cell.model_copy(
            update={"best": BestCheckpoint(checkpoint=checkpoints[cell.seed], guidance=3.0, adapter="best.safetensors")}
        )
        if cell.entry == entry and cell.seed in checkpoints
        else cell
        for cell in results.cells
    ]
    return results.model_copy(update={"cells": cells})


def compared(checkpoints: dict[int, int]) -> Comparison:
    world = World(CURVES)
    return synthetic(world, cells=with_best(records(world), "ours", checkpoints).cells)


def rows(table: Table) -> dict[str, list[str]]:
    return {row.label: [cell.value for cell in row.cells] for row in table.rows}


def test_the_best_stands_under_the_end_with_where_it_was_taken() -> None:
    comparison = compared({0: 1, 1: 2})
    table = ends_table(comparison)
    assert [row.label for row in table.rows] == ["Base", "OURS", LABEL, "THEIRS"]
    # In domain: seed 0 has .6 at its first checkpoint, seed 1 its end of .5.
    assert (rows(table)["OURS"][0], rows(table)[LABEL][0]) == ("0.500", "0.550")
    (best,) = [row for row in table.rows if row.label == LABEL]
    assert best.note == "guidance 3; taken after 70, 140 denoiser evaluations"
    assert best.color == "entry-0"
    assert "highest headline on validation prompts at guidance 3" in table.about
    assert "no test prompt had a say" in table.about
    # The base has .4 at its best guidance.
    assert rows(gains_table(comparison))[LABEL][0] == "+0.150"


def test_nothing_is_said_where_none_was_kept() -> None:
    comparison = compared({})
    assert [row.label for row in ends_table(comparison).rows] == ["Base", "OURS", "THEIRS"]
    assert "validation prompts at guidance" not in ends_table(comparison).about
    assert LABEL not in ends_figure(comparison, "in_domain")


def test_the_page_shows_both(tmp_path: Path) -> None:
    results = with_best(write_synthetic(tmp_path, World(CURVES)), "ours", {0: 1, 1: 1})
    write_record(results, tmp_path / "results.json")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "taken after 70, 70 denoiser evaluations" in page
    assert LABEL in ends_figure(compared({0: 1, 1: 1}), "in_domain")
    assert LABEL in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert LABEL in (tmp_path / "tables.tex").read_text(encoding="utf-8")
