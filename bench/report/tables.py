"""The report's tables as rows of text, for the page to lay out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..results import Metric, Results
from .curves import Axis, baselines
from .guidance import BASE, best_guidance, difference_to_base, guidances, guided_estimate
from .intervals import Estimate, base_estimate, final_estimate, paired_difference, strongest_baseline
from .numbers import format_bounds, format_number, format_ratio, time_unit
from .thresholds import SeedSpeed, Speed, speed

_ARROWS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better"), "none": ("=", "as the base is best")}
_TIMES, _NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class TableCell:
    """One number of a table: the value, and under it the interval or why there is none (may be empty)."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class SpeedRow:
    """One line of a time-to-threshold table; ``total`` is the line over all seeds of a baseline."""

    baseline: str
    seed: str
    threshold: str
    baseline_at: str
    challenger_at: str
    ratio: TableCell
    total: bool


@dataclass(frozen=True)
class MetricRow:
    """One metric of the table of final values; ``arrow`` and ``direction`` say which way is better."""

    label: str
    arrow: str
    direction: str
    description: str
    primary: bool
    cells: list[TableCell]


@dataclass(frozen=True)
class GuidanceRow:
    """The base or an algorithm at every guidance.

    Attributes:
        best: which cell is at its best guidance on the primary metric; None where nothing was measured.
        gain: at its best less the base at the base's.
    """

    name: str
    cells: list[TableCell]
    best: int | None
    gain: TableCell


def speed_rows(results: Results, axis: Axis) -> list[SpeedRow]:
    """The time-to-threshold table: per baseline a line per seed, then one over all seeds.

    Empty without a seed that both sides finished.
    """
    ends = [getattr(run.evaluations[-1], axis) for run in results.runs if run.evaluations]
    amount = _amount_format(axis, max(ends, default=0.0))
    rows = []
    for baseline in baselines(results):
        found = speed(results, baseline, axis)
        rows += [_seed_row(results.label(baseline), seed, amount) for seed in found.seeds]
        if found.seeds:
            seeds = f"all {len(found.seeds)}" if len(found.seeds) > 1 else "one seed"
            rows.append(SpeedRow(results.label(baseline), seeds, "", "", "", _speed_cell(found), True))
    return rows


def _seed_row(baseline: str, seed: SeedSpeed, amount: Callable[[float], str]) -> SpeedRow:
    if seed.ratio is not None:
        ratio = TableCell(f"{format_ratio(seed.ratio)}{_TIMES}")
    elif seed.bound is not None:
        ratio = TableCell("not reached", f"below {format_ratio(seed.bound)}{_TIMES}")
    else:
        ratio = TableCell("undefined", "the untrained base already meets it")
    return SpeedRow(
        baseline,
        str(seed.seed),
        format_number(seed.threshold),
        amount(seed.baseline_at),
        "not reached" if seed.challenger_at is None else amount(seed.challenger_at),
        ratio,
        False,
    )


def _speed_cell(found: Speed) -> TableCell:
    missed, undefined = found.count("not reached"), found.count("undefined")
    if found.status == "undefined":
        return TableCell("undefined", "the untrained base already meets every threshold")
    if found.bound is not None:
        return TableCell(
            "not reached", f"in {missed} of {len(found.seeds)} seeds; at most {format_ratio(found.bound)}{_TIMES}"
        )
    ratio = found.ratio
    assert ratio is not None  # it is measured
    note = "one seed, no interval"
    if ratio.interval is not None:
        note = " to ".join(format_ratio(bound) for bound in ratio.interval)
    return TableCell(
        f"{format_ratio(ratio.mean)}{_TIMES}", f"{note}; {undefined} undefined left out" if undefined else note
    )


def metric_rows(results: Results, domain: Literal["in", "out"]) -> list[MetricRow]:
    """Final values of the metrics of one domain: base, every algorithm, then challenger less strongest baseline."""
    pair = _compared_pair(results)
    rows = []
    for name, metric in results.metrics.items():
        if metric.domain != domain:
            continue
        cells = [_value_cell(base_estimate(results, name))]
        cells += [_value_cell(final_estimate(results, algorithm, name)) for algorithm in results.algorithms]
        if pair is not None:
            cells.append(_value_cell(paired_difference(results, *pair, name), signed=True))
        arrow, direction = _ARROWS[metric.better]
        rows.append(MetricRow(metric.label, arrow, direction, metric.description, name == results.primary, cells))
    return rows


def difference_title(results: Results) -> str:
    """The heading of the last column of :func:`metric_rows`; empty where it has none."""
    pair = _compared_pair(results)
    return "" if pair is None else f"{results.label(pair[0])} less {results.label(pair[1])}"


def _compared_pair(results: Results) -> tuple[str, str] | None:
    """The challenger and the strongest baseline; None where one of them is missing."""
    strongest = strongest_baseline(results)
    if strongest is None or results.challenger not in results.algorithms:
        return None
    return results.challenger, strongest


def _value_cell(found: Estimate | None, signed: bool = False) -> TableCell:
    if found is None:
        return TableCell(_NONE, "no run")
    value = f"+{format_number(found.mean)}" if signed and found.mean > 0 else format_number(found.mean)
    return TableCell(value, "" if found.interval is None else format_bounds(found))


def _amount_format(axis: Axis, largest: float) -> Callable[[float], str]:
    """One unit for a whole table, so that its lines compare at a glance."""
    if axis == "denoiser_evaluations":
        return lambda value: f"{value:,.0f}"
    seconds, unit, decimals = time_unit(largest)
    return lambda value: f"{value / seconds:.{decimals}f} {unit}"


def guidance_tables(results: Results) -> list[tuple[Metric, list[GuidanceRow]]]:
    """The primary metric, and what was not trained on, at every guidance; nothing where none was measured."""
    if not results.base:
        return []
    shown = [results.primary]
    shown += [name for name, metric in results.metrics.items() if metric.domain == "out" and metric.better == "higher"]
    return [
        (results.metrics[name], [_guidance_row(results, row, name) for row in [BASE, *results.algorithms]])
        for name in shown
    ]


def _guidance_row(results: Results, name: str, metric: str) -> GuidanceRow:
    """The row of an algorithm, or of the base (``base``), which gains nothing over itself."""
    best = best_guidance(results, name)
    cells = [_value_cell(guided_estimate(results, name, guidance, metric)) for guidance in guidances(results)]
    index = None if best is None else guidances(results).index(best.guidance)
    if name == BASE:
        return GuidanceRow("Base", cells, index, TableCell(""))
    gain = _value_cell(difference_to_base(results, name, metric), signed=True)
    return GuidanceRow(results.label(name), cells, index, gain)


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
    """Where the algorithms differ: (dotted key, value per algorithm), sorted by key; a dash where one lacks the key."""
    flat = [flatten(mapping) for mapping in settings.values()]
    keys = sorted({key for mapping in flat for key in mapping})
    rows = [(key, [mapping.get(key, _NONE) for mapping in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
