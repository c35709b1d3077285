"""The tables of what it took: speed, cost, tuning, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..records import CellRecord
from .comparison import Comparison
from .measures import shared_seeds
from .numbers import NONE, format_amount, format_between, format_bounds, format_number, time_unit
from .speed import AXES, Axis, Crossing, ThresholdSpeed, axes_of, cost, speed
from .table import Column, Row, Table, TableCell
from .tables import color_of

GIB = 2**30


def speed_tables(comparison: Comparison) -> list[Table]:
    """How soon every threshold is reached, a table an axis; none without thresholds or another algorithm."""
    results = comparison.results
    others = [
        name
        for name, entry in results.entries.items()
        if entry.kind == "algorithm"
        and name != results.challenger
        and shared_seeds(comparison, results.challenger, name)
    ]
    if not others or not results.task.thresholds:
        return []
    return [_speed_table(comparison, axis, others) for axis in axes_of(comparison)]


def _speed_table(comparison: Comparison, axis: Axis, others: Sequence[str]) -> Table:
    ours, amount = comparison.label(comparison.results.challenger), _amount(comparison, axis)
    rows = []
    for other in others:
        found = speed(comparison, other, axis)
        for each in found.thresholds:
            if found.defined:
                ratio = _ratio_cell(each)
            else:
                gain = found.baseline_gain
                why = "" if gain is None else f": {format_number(gain.mean, signed=True)}, {format_bounds(gain, True)}"
                ratio = TableCell("undefined", f"no sure gain over the base{why}")
            there = "the base at its best guidance is there untrained" if each.base_there else ""
            cells = [ratio, _crossings_cell(each.challenger, amount), _crossings_cell(each.baseline, amount)]
            label = f"{comparison.label(other)} to {format_number(each.threshold)}"
            rows.append(Row(label, cells, there, color_of(comparison, other)))
    columns = [
        Column("Ratio", "", f"above 1: {ours} is sooner"),
        Column(ours, "Reached after"),
        Column("The other", "Reached after"),
    ]
    return Table(f"In {AXES[axis]}", "Other, threshold", columns, rows)


def _ratio_cell(found: ThresholdSpeed) -> TableCell:
    crossings = [*found.challenger.values(), *found.baseline.values()]
    if found.ratio is None:
        if any(each.by == 0 for each in crossings):
            return TableCell("undefined", "the base is there")
        came = any(each.reached for each in crossings)
        return TableCell("undefined", "evaluations are too far apart to tell" if came else "neither reached it")
    runs = found.ratio.runs
    late = sum(not each.reached for each in crossings)
    notes = [f"a new run {format_between(runs.low, runs.high)}"] if runs else []
    notes += [f"{late} of {len(crossings)} runs did not reach it"] if late else []
    return TableCell(format_between(found.ratio.low, found.ratio.high), "; ".join(notes), strong=True)


def _crossings_cell(crossings: Mapping[int, Crossing], amount: Callable[[float], str]) -> TableCell:
    """The bounds of every seed, those of equal bounds together."""
    found: dict[str, list[int]] = {}
    for seed, each in crossings.items():
        if each.by == 0:
            text = "at the start"
        elif math.isinf(each.by):
            text = f"not by {amount(each.after)}"
        else:
            text = f"{amount(each.after)} to {amount(each.by)}"
        found.setdefault(text, []).append(seed)
    named = [f"{text} (seed{'s' if len(s) > 1 else ''} {', '.join(map(str, s))})" for text, s in found.items()]
    return TableCell("; ".join(named if len(crossings) > 1 else found) or NONE)


def _amount(comparison: Comparison, axis: Axis) -> Callable[[float], str]:
    """One unit for a whole table, so that its lines compare at a glance."""
    if axis != "total_seconds":
        return format_amount
    points = [point for cell in comparison.results.cells for point in cell.checkpoints]
    seconds, unit, decimals = time_unit(max((cost(point, axis) or 0.0 for point in points), default=0.0))
    return lambda value: f"{value / seconds:.{decimals}f} {unit}"


def cost_table(comparison: Comparison) -> Table:
    """What a run of every entry cost, mean over its finished seeds."""
    results = comparison.results
    cells = {entry: list(results.cells_of(entry).values()) for entry in results.entries}
    ends = [cell.checkpoints[-1] for group in cells.values() for cell in group if cell.checkpoints]
    parts = list(dict.fromkeys(part for end in ends for part in end.seconds))
    seconds, unit, decimals = time_unit(max((end.total_seconds for end in ends), default=0.0))
    columns = [
        *(
            Column(label)
            for label in ("Iterations", "Optimizer steps", "Denoiser evaluations", "FLOPs", "Images scored")
        ),
        *(Column(part.replace("_", " ").capitalize(), f"Time, {unit}") for part in [*parts, "together"]),
        *(
            Column(label)
            for label in ("Processes", "GPU-hours", "Peak memory, GiB", "Evaluation, seconds", "Drift at the end")
        ),
    ]
    rows = []
    for entry, group in cells.items():
        trained = [cell for cell in group if cell.checkpoints]
        if not trained:
            rows.append(Row(comparison.label(entry), [TableCell(NONE)] * len(columns), "no finished run"))
            continue
        numbers: list[str] = [
            *(_mean(trained, _end(axis), format_amount) for axis in _COUNTS),
            *(_mean(trained, _part(part), lambda v: f"{v / seconds:.{decimals}f}") for part in parts),
            _mean(trained, lambda c: c.checkpoints[-1].total_seconds, lambda v: f"{v / seconds:.{decimals}f}"),
            _processes(trained),
            _mean(trained, lambda c: c.checkpoints[-1].total_seconds * c.processes / 3600, lambda v: f"{v:.3g}"),
            _mean(trained, lambda c: None if c.peak_memory is None else c.peak_memory / GIB, lambda v: f"{v:.2f}"),
            _mean(trained, lambda c: c.evaluation_seconds, lambda v: f"{v:.1f}"),
            _mean(trained, lambda c: c.checkpoints[-1].drift, format_number),
        ]
        cells_ = [TableCell(number) for number in numbers]
        rows.append(Row(comparison.label(entry), cells_, "", color_of(comparison, entry)))
    return Table(
        "What a run cost",
        "Method",
        columns,
        rows,
        about="Mean over the finished seeds. Processes are those of a run; GPU-hours are its training "
        "time times them, whatever they ran on. "
        "Evaluation is outside the budget.",
    )


def _processes(cells: Sequence[CellRecord]) -> str:
    """Of a run: one number, or all that there were."""
    return ", ".join(str(count) for count in sorted({cell.processes for cell in cells}))


_COUNTS = ("iteration", "steps", "denoiser_evaluations", "flops", "images_scored")


def _end(axis: str) -> Callable[[CellRecord], float | None]:
    return lambda cell: getattr(cell.checkpoints[-1], axis)


def _part(part: str) -> Callable[[CellRecord], float | None]:
    return lambda cell: cell.checkpoints[-1].seconds.get(part)


def _mean(
    cells: Sequence[CellRecord], read: Callable[[CellRecord], float | None], write: Callable[[float], str]
) -> str:
    """The mean of what every cell has; a dash where one has not."""
    found = [read(cell) for cell in cells]
    known = [float(each) for each in found if each is not None]
    return write(sum(known) / len(known)) if len(known) == len(found) else NONE


def tuning_table(comparison: Comparison) -> Table | None:
    """How every entry's settings were found: trials, the best, what they were drawn from; None without trials."""
    results = comparison.results
    if not results.trials:
        return None
    rows = []
    for entry in results.entries:
        trials = [trial for trial in results.trials if trial.entry == entry]
        known = [trial for trial in trials if trial.value is not None]
        best = max(known, key=lambda trial: comparison.sign * (trial.value or 0.0), default=None)
        ranges = flatten(results.ranges.get(entry, {}))
        cells = [
            TableCell(str(len(trials))),
            TableCell(NONE if best is None or best.value is None else format_number(best.value)),
            TableCell(format_amount(sum(trial.denoiser_evaluations for trial in trials)) if trials else NONE),
            TableCell("" if best is None else _pairs(flatten(best.settings))),
            TableCell(_pairs(ranges) or NONE),
        ]
        failed = len(trials) - len(known)
        rows.append(
            Row(comparison.label(entry), cells, f"{failed} failed" if failed else "", color_of(comparison, entry))
        )
    heads = ("Trials", "Best on validation", "Denoiser evaluations", "Settings of the best", "Drawn from")
    return Table("Tuning", "Method", [Column(head) for head in heads], rows)


def _pairs(flat: Mapping[str, str]) -> str:
    return "; ".join(f"{key} {value}" for key, value in flat.items())


def settings_table(comparison: Comparison) -> Table:
    """Where the settings differ; a dash where an entry lacks one."""
    entries = comparison.results.entries
    differing = differing_settings({name: entry.settings for name, entry in entries.items()})
    columns = [Column(entry.label) for entry in entries.values()]
    return Table(
        "Settings that differ", "Setting", columns, [Row(k, [TableCell(v) for v in vs]) for k, vs in differing]
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with JSON values; an empty mapping stays visible as ``{}``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Where the entries differ: (dotted key, value per entry), sorted by key; a dash where one lacks the key."""
    flat = [flatten(mapping) for mapping in settings.values()]
    keys = sorted({key for mapping in flat for key in mapping})
    rows = [(key, [mapping.get(key, NONE) for mapping in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
