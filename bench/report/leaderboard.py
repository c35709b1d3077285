"""A page from several comparisons: one table a task, and across tasks how likely one method's run beats another's.

What differs in how it was measured is not put into one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically

from ..records import BASE
from .comparison import Comparison, read_comparison
from .intervals import probability_of_improvement
from .measures import difference, value
from .numbers import NONE, count, format_amount, format_guidances, format_interval, format_number
from .page import environment
from .table import Column, Row, Table, TableCell, markdown
from .tables import ROLES, chosen_on, difference_cell

Named = tuple[str, Comparison]
"""A comparison and what it is called: its folder."""


def write_leaderboard(folders: Sequence[Path], output: Path) -> Path:
    """Draw one page, and its tables as Markdown beside it, from several folders that comparisons wrote.

    Args:
        output: the HTML file.

    Raises:
        UserError: no folder, one twice, one that cannot be read, or two of one task that were measured differently.
    """
    resolved = [folder.resolve() for folder in folders]
    if not folders or len(set(resolved)) != len(resolved):
        raise UserError("leaderboard: name one or more folders of comparisons, each once")
    named = [(folder.resolve().name, read_comparison(folder)) for folder in folders]
    check_alike(named)
    tables = leaderboard_tables(named)
    page = environment().get_template("leaderboard.html.j2").render(tables=tables, names=[name for name, _ in named])
    write_text_atomically(output.with_suffix(".md"), markdown(tables))
    write_text_atomically(output, page)
    return output


def check_alike(named: Sequence[Named]) -> None:
    """Raise if comparisons of one task were measured in different ways.

    Raises:
        UserError: the first thing that differs, by name, with both values and both folders.
    """
    first: dict[str, Named] = {}
    for name, comparison in named:
        other = first.setdefault(comparison.results.task.name, (name, comparison))
        ours, theirs = _measured_by(comparison), _measured_by(other[1])
        for what in [*theirs, *(what for what in ours if what not in theirs)]:
            if what in ours and what in theirs and ours[what] != theirs[what]:
                both = f"{_short(theirs[what])} in {other[0]} and {_short(ours[what])} in {name}"
                raise UserError(
                    f"leaderboard: {what} differs, {both}; what was measured differently is not put into one table"
                )


def _measured_by(comparison: Comparison) -> dict[str, Any]:
    """All that a number depends on beside the adapter, by name."""
    results = comparison.results
    task, sampling = results.task, results.sampling
    found: dict[str, Any] = {"task version": task.version, "headline": task.headline}
    found |= {"prompts per tag": task.prompts_per_tag, "margin": task.margin}
    for name, metric in results.metrics.items():
        if not metric.missing:
            found |= {
                f"version of {name}": metric.version,
                f"weights of {name}": metric.weights,
                f"relation of {name} to training": metric.relation,
                f"direction of {name}": metric.better,
            }
    found |= {"sampler": sampling.sampler, "steps": sampling.steps, "precision": sampling.precision}
    found |= {"size of pictures": f"{sampling.width} × {sampling.height}"}
    found["choice of guidances"] = ", ".join(f"{each:g}" for each in sampling.guidances)
    # The validation prompts too: guidance was chosen on them.
    for name, prompts in sorted(results.sets.items(), key=lambda each: each[1].role == "validation"):
        found[f"role of {name}"] = prompts.role
        found[f"images per prompt of {name}"] = prompts.images_per_prompt
        found[f"prompts of {name}"] = [(prompt.text, prompt.tag) for prompt in prompts.prompts]
    found["number of pictures that the base's guidance was chosen on"] = chosen_on(comparison, [BASE])
    return found


def _short(value: Any) -> str:
    """A value for a message; of a list its length."""
    return f"{len(value)} of them" if isinstance(value, list) else str(value)


def leaderboard_tables(named: Sequence[Named]) -> list[Table]:
    """A table for each task, the best in domain first, then the chance that one method's run beats another's."""
    tasks: dict[str, list[Named]] = {}
    for name, comparison in named:
        tasks.setdefault(comparison.results.task.name, []).append((name, comparison))
    tables = [_task_table(group) for group in tasks.values()]
    improvement = _improvement_table(list(tasks.values()))
    return tables if improvement is None else [*tables, improvement]


def _task_table(group: Sequence[Named]) -> Table:
    first = group[0][1].results
    metric = first.metrics[first.task.headline]
    columns = [Column(label, group_) for group_ in ROLES.values() for label in (metric.label, "Gain over the base")]
    heads = ("Guidance", "Seeds", "Denoiser evaluations", "Task", "Metric", "Sampling", "From")
    rows: list[tuple[float, Row]] = []
    for name, comparison in group:
        for entry in [BASE, *comparison.results.entries]:
            found = value(comparison, entry, "in_domain", first.task.headline)
            if found is not None:
                rows.append((-comparison.sign * found.mean, _row(name, comparison, entry)))
    ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return Table(
        f"{first.task.name}, version {first.task.version}",
        "Method",
        [*columns, *(Column(head) for head in heads)],
        ordered,
        about="Best in domain first. Under a value: the 95 % interval for these adapters and new prompts. Gains are "
        "over the untrained base of the same comparison at its best guidance, picture by picture; under one that "
        "interval, the one for a new run from five seeds on, and what both show.",
    )


def _row(name: str, comparison: Comparison, entry: str) -> Row:
    results = comparison.results
    task, sampling = results.task, results.sampling
    cells = []
    for role in ROLES:
        found = value(comparison, entry, role, task.headline)
        cells.append(
            TableCell(NONE, "not measured")
            if found is None
            else TableCell(format_number(found.mean), format_interval(found.prompts))
        )
        if entry == BASE:
            cells.append(TableCell(NONE))
        else:
            gained = difference(comparison, entry, BASE, role, task.headline)
            cells.append(difference_cell(results.metrics, task, gained, task.headline, role))
    places, metric = comparison.finished(entry), results.metrics[task.headline]
    ends = [cell.checkpoints[-1] for cell in results.cells_of(entry).values() if cell.checkpoints]
    cost = np.mean([end.denoiser_evaluations for end in ends]) if ends else 0
    weights = f", weights {metric.weights}" if metric.weights else ""
    texts = [
        format_guidances(place[3] for place in places.values()),
        str(len(places)) if entry != BASE else NONE,
        format_amount(float(cost)),
        f"version {task.version}",
        f"{task.headline} {metric.version}{weights}",
        f"{sampling.sampler}, {sampling.steps} steps, {sampling.precision}, {sampling.width} × {sampling.height}",
        name,
    ]
    control = entry != BASE and results.entries[entry].kind == "control"
    return Row(comparison.label(entry), [*cells, *map(TableCell, texts)], "control" if control else "")


def _improvement_table(tasks: Sequence[Sequence[Named]]) -> Table | None:
    """How likely a run of the row's method is better in domain than one of the column's; None without two methods."""
    runs = [_runs(group) for group in tasks]
    labels = [label for label in runs[0] if all(label in found for found in runs)] if runs else []
    if len(labels) < 2:
        return None
    rows = []
    for first in labels:
        cells = []
        for second in labels:
            if first == second:
                cells.append(TableCell(NONE))
                continue
            mean, held = probability_of_improvement([(found[first], found[second]) for found in runs])
            note = f"{held.low:.2f} to {held.high:.2f}" if held else "one run"
            cells.append(TableCell(f"{mean:.2f}", note))
        rows.append(Row(first, cells))
    return Table(
        "Probability of improvement",
        "A run of",
        [Column(label, "is better than a run of") for label in labels],
        rows,
        about="The share of pairs of runs in which the row's is better in domain, averaged over "
        f"{count(len(tasks), 'task')}; one half is no difference. Under it: the 95 % interval over runs. Methods that "
        "every task has, by their labels; of one task's, those of other settings or budgets stand apart.",
    )


def _runs(group: Sequence[Named]) -> dict[str, Any]:
    """The headline in domain of each run of each method that a task's comparisons have, higher is better.

    Runs of one label are one method's where settings and budget are equal; else the label gets its folder's name.
    """
    entries = [(name, comparison, entry) for name, comparison in group for entry in comparison.results.entries]
    methods: dict[str, list[Any]] = {}
    for _, comparison, entry in entries:
        results = comparison.results
        method = results.entries[entry].settings, results.budget.evaluations, results.budget.flops
        methods.setdefault(comparison.label(entry), []).append(method)
    found: dict[str, list[float]] = {}
    for name, comparison, entry in entries:
        label, ends = comparison.label(entry), value(comparison, entry, "in_domain", comparison.results.task.headline)
        one = all(method == methods[label][0] for method in methods[label])
        if ends is not None:
            points = [comparison.sign * point for point in ends.points]
            found.setdefault(label if one else f"{label} ({name})", []).extend(points)
    return {label: np.array(points) for label, points in found.items()}
