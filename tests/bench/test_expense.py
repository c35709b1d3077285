"""What a comparison is said to take, counted by hand."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dgpo_bench.commands import main
from dgpo_bench.expense import expense_rows, planned_iterations
from dgpo_bench.forecast import best_evaluations
from dgpo_bench.plan import Plan
from dgpo_bench.prompt_sets import sampled_sets
from tests.bench.small_plans import two_seeds_of

pytestmark = pytest.mark.fast


def plan(**shared: object) -> Plan:
    return two_seeds_of(["dgpo"], jobs=1, **shared)


def first(text: str) -> int:
    """The number that a row begins with."""
    return int(text.split()[0].rstrip(",").replace(",", ""))


def test_everything_is_counted_before_it_is_done() -> None:
    """Two entries with two seeds; pictures at 10 steps and guidances 1, 2, 3: 10, 20 and 20 evaluations."""
    small = plan()
    rows, sets = dict(expense_rows(small)), sampled_sets(small.task, small.size)
    counts = {name: 2 * len(each.prompts) for name, each in sets.items()}
    assert rows["cells"] == "4: dgpo, zero; 2 seeds"
    assert rows["training"].startswith("4,000 denoiser evaluations, 1,000 a cell")
    assert rows["measuring the base"] == f"{sum(counts.values()) * 50:,} (3 guidances)"
    curve = 2 * sum(len(each.curve) for each in sets.values())
    tested = sum(counts.values()) - counts["validation"]
    pictures = 3 * sum(counts.values()) + 4 * (2 * curve + 3 * counts["validation"] + tested)
    assert rows["pictures measured"] == f"{pictures:,}"
    assert rows["memory"].endswith("metrics not counted")
    assert "floating-point operations" in rows["operations"]


def test_a_model_that_is_not_here_costs_only_the_rows_that_need_it() -> None:
    rows = dict(expense_rows(plan(model={"path": "no/such-model"})))
    assert rows["memory"].startswith("cannot be told here: ")
    assert "operations" not in rows


def test_the_best_of_eight_costs_six_more_pictures_of_every_test_prompt() -> None:
    without = plan()
    more = without.model_copy(update={"best_of_n": True})
    tested = len(sampled_sets(more.task, more.size)["test"].prompts)
    rows, before = dict(expense_rows(more)), dict(expense_rows(without))

    for row, each in (("pictures measured", 6), ("measuring the base", 6 * 20)):
        assert first(rows[row]) - first(before[row]) == each * tested


def test_the_best_checkpoints_are_counted_where_they_are_asked_for() -> None:
    without = plan()
    kept = without.with_best(True)
    each = best_evaluations(kept, sampled_sets(kept.task, kept.size))
    rows, before = dict(expense_rows(kept)), dict(expense_rows(without))
    assert each > 0
    assert rows["with the best checkpoints"] == f"{4 * each:,} of these at most"
    assert "with the best checkpoints" not in before
    assert first(rows["measuring the cells"]) - first(before["measuring the cells"]) == 4 * each
    assert first(rows["pictures measured"]) > first(before["pictures measured"])


def test_the_flag_changes_the_size_and_stands_in_the_command() -> None:
    without = plan()
    kept = without.with_best(True)
    assert without.with_best(None) == without
    assert kept.command == without.command + " --best-checkpoint"
    preset = kept.preset.model_copy(update={"sizes": {**kept.preset.sizes, "quick": kept.size}})
    assert kept.model_copy(update={"preset": preset}).command == without.command
    assert without.model_copy(update={"preset": preset}).command == without.command + " --no-best-checkpoint"
    shown = CliRunner().invoke(main, ["plan", "shapes", "--size", "quick", "--best-checkpoint"]).output
    assert "with the best checkpoints" in shown


def test_the_looks_of_a_guard_are_counted_with_the_measuring() -> None:
    """Two entries, two seeds; the base and every tenth iteration are looked at: 8 prompts, two pictures each."""
    training = {"prompts_per_iteration": 2, "group_size": 2, "guard": {"prompts": 8, "images": 2}}
    watched, alone = plan(training=training), plan(training={**training, "guard": None})
    rows, before = dict(expense_rows(watched)), dict(expense_rows(alone))
    looks = [1 + planned_iterations(watched.run_config(entry, 0), watched.size) // 10 for entry in watched.entries]
    pictures = 2 * 16 * sum(looks)
    assert rows["training.guard's looks"] == f"{pictures * 20:,}, {pictures:,} pictures scored, at least"
    assert "training.guard's looks" not in before
    assert rows["operations"] != before["operations"]
