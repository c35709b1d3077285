"""``results.json`` to one self-contained HTML file: no script, no request, readable in ten years."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically

from .figures import colours, metric_figure, time_unit, tradeoff_figure
from .guidance import BASE, base_sentence, best_guidance, difference_to_base, guidances, guided_estimate
from .results import Metric, Results, read_results
from .statistics import (
    CHALLENGER,
    RESAMPLES,
    Axis,
    Estimate,
    SeedSpeed,
    Speed,
    base_estimate,
    baselines,
    display_name,
    final_estimate,
    format_number,
    format_ratio,
    missing_runs,
    paired_difference,
    primary_metric,
    runs_of,
    speed,
    strongest_baseline,
    verdict,
)

_HERE = Path(__file__).parent
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ARROWS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better"), "none": ("=", "as the base is best")}
_TIMES, _NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_AXES: tuple[tuple[Axis, str], ...] = (("seconds", "training time"), ("denoiser_evaluations", "denoiser evaluations"))


@dataclass(frozen=True)
class Cell:
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
    ratio: Cell
    total: bool


@dataclass(frozen=True)
class MetricRow:
    """One metric of the table of final values; ``arrow`` and ``direction`` say which way is better."""

    label: str
    arrow: str
    direction: str
    description: str
    primary: bool
    cells: list[Cell]


@dataclass(frozen=True)
class GuidanceRow:
    """The base or an algorithm at every guidance.

    Attributes:
        best: which cell is at its best guidance on the primary metric; None where nothing was measured.
        gain: at its best less the base at the base's.
    """

    name: str
    cells: list[Cell]
    best: int | None
    gain: Cell


@dataclass(frozen=True)
class Picture:
    """One gallery picture as a data URI, with the name above it and the text for who cannot see it."""

    name: str
    uri: str
    alt: str


def write_report(folder: Path) -> Path:
    """Draw ``folder/report.html`` from ``folder/results.json`` and the gallery pictures beside it.

    Raises:
        UserError: the results cannot be read, a gallery picture is missing, or the folder cannot be written to.
    """
    path = folder / "report.html"
    write_text_atomically(path, render_report(read_results(folder / "results.json"), folder))
    return path


def render_report(results: Results, folder: Path) -> str:
    """The whole page. The same results and pictures give the same text, byte for byte.

    Raises:
        UserError: the primary metric is unusable, or a gallery picture in ``folder`` is missing or no PNG.
    """
    primary_metric(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    out = [name for name, metric in results.metrics.items() if metric.domain == "out"]
    return environment.get_template("report.html.j2").render(
        results=results,
        verdict=verdict(results),
        against_base=base_sentence(results, CHALLENGER, display_name(CHALLENGER)),
        guidances=guidances(results),
        guidance_tables=guidance_tables(results),
        missing=[f"{display_name(algorithm)} seed {seed}" for algorithm, seed in missing_runs(results)],
        primary=results.metrics[results.primary],
        challenger=display_name(CHALLENGER),
        names={algorithm: display_name(algorithm) for algorithm in results.algorithms},
        colours=colours(results.algorithms),
        figures=[_inline(metric_figure(results, results.primary, axis, f"primary-{axis}")) for axis, _ in _AXES],
        speeds=[(title, speed_rows(results, axis)) for axis, title in _AXES],
        difference_title=_difference_title(results),
        domains=[(title, metric_rows(results, domain)) for domain, title in _DOMAINS],
        tradeoffs=[_inline(tradeoff_figure(results, name, f"tradeoff-{i}")) for i, name in enumerate(out)],
        pictures=gallery(results, folder),
        differing=differing_settings(results.settings),
        settings={display_name(name): _yaml(settings) for name, settings in results.settings.items()},
        published=yaml.safe_load((_HERE / "published.yaml").read_text(encoding="utf-8")),
        interval_note=interval_note(results),
        budget=_budget(results),
        folder=folder.name or "FOLDER",
    )


def write_curves(results: Results, path: Path) -> None:
    """Every evaluation as one CSV row: algorithm, seed, iteration, both costs, then a column per metric (or empty)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["algorithm", "seed", "iteration", "seconds", "denoiser_evaluations", *results.metrics])
    for run in results.runs:
        for point in run.evaluations:
            values = [point.metrics.get(name, "") for name in results.metrics]
            cost = [point.iteration, point.seconds, point.denoiser_evaluations]
            writer.writerow([run.algorithm, run.seed, *cost, *values])
    write_text_atomically(path, buffer.getvalue())


def _inline(svg: str) -> Markup:
    """Our own figures are the one thing not escaped again: figures.py escapes every label inside them."""
    return Markup(svg)  # noqa: S704


# ---- tables


def speed_rows(results: Results, axis: Axis) -> list[SpeedRow]:
    """Per baseline: a line per seed, then one over all seeds. Empty without a seed that both sides finished."""
    ends = [getattr(run.evaluations[-1], axis) for run in results.runs if run.evaluations]
    amount = _amount_format(axis, max(ends, default=0.0))
    rows = []
    for baseline in baselines(results):
        found = speed(results, baseline, axis)
        rows += [_seed_row(baseline, seed, amount) for seed in found.seeds]
        if found.seeds:
            name, count = display_name(baseline), len(found.seeds)
            seeds = f"all {count}" if count > 1 else "one seed"
            rows.append(SpeedRow(name, seeds, "", "", "", _speed_cell(found), True))
    return rows


def _seed_row(baseline: str, seed: SeedSpeed, amount: Callable[[float], str]) -> SpeedRow:
    if seed.ratio is not None:
        ratio = Cell(f"{format_ratio(seed.ratio)}{_TIMES}")
    elif seed.bound is not None:
        ratio = Cell("not reached", f"below {format_ratio(seed.bound)}{_TIMES}")
    else:
        ratio = Cell("undefined", "the untrained base already meets it")
    return SpeedRow(
        display_name(baseline),
        str(seed.seed),
        format_number(seed.threshold),
        amount(seed.baseline_at),
        "not reached" if seed.challenger_at is None else amount(seed.challenger_at),
        ratio,
        False,
    )


def _speed_cell(found: Speed) -> Cell:
    missed, undefined = found.count("not reached"), found.count("undefined")
    if found.bound is not None:
        return Cell(
            "not reached", f"in {missed} of {len(found.seeds)} seeds; at most {format_ratio(found.bound)}{_TIMES}"
        )
    if found.ratio is None:
        return Cell("undefined", "the untrained base already meets every threshold")
    ratio = found.ratio
    note = "one seed, no interval"
    if ratio.low is not None and ratio.high is not None:
        note = f"{format_ratio(ratio.low)} to {format_ratio(ratio.high)}"
    return Cell(f"{format_ratio(ratio.mean)}{_TIMES}", f"{note}; {undefined} undefined left out" if undefined else note)


_DOMAINS = (("in", "In domain: what was optimised"), ("out", "Out of domain: what should not suffer"))


def metric_rows(results: Results, domain: str) -> list[MetricRow]:
    """Final values of the metrics of one domain; cells are base, every algorithm, then DGPO minus the strongest."""
    strongest = strongest_baseline(results)
    rows = []
    for name, metric in results.metrics.items():
        if metric.domain != domain:
            continue
        cells = [_value_cell(base_estimate(results, name))]
        cells += [_value_cell(final_estimate(results, algorithm, name)) for algorithm in results.algorithms]
        if strongest is not None and CHALLENGER in results.algorithms:
            cells.append(_value_cell(paired_difference(results, CHALLENGER, strongest, name), signed=True))
        arrow, direction = _ARROWS[metric.better]
        rows.append(MetricRow(metric.label, arrow, direction, metric.description, name == results.primary, cells))
    return rows


def _difference_title(results: Results) -> str:
    strongest = strongest_baseline(results)
    if strongest is None or CHALLENGER not in results.algorithms:
        return ""
    return f"{display_name(CHALLENGER)} less {display_name(strongest)}"


def _value_cell(found: Estimate | None, signed: bool = False) -> Cell:
    if found is None:
        return Cell(_NONE, "no run")
    value = f"+{format_number(found.mean)}" if signed and found.mean > 0 else format_number(found.mean)
    if found.low is None or found.high is None:
        return Cell(value)
    return Cell(value, f"{format_number(found.low)} to {format_number(found.high)}")


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
        (results.metrics[name], [_guidance_row(results, who, name) for who in [BASE, *results.algorithms]])
        for name in shown
    ]


def _guidance_row(results: Results, who: str, metric: str) -> GuidanceRow:
    best = best_guidance(results, who)
    cells = [_value_cell(guided_estimate(results, who, guidance, metric)) for guidance in guidances(results)]
    difference = None if who == BASE else difference_to_base(results, who, metric)
    return GuidanceRow(
        "Base" if who == BASE else display_name(who),
        cells,
        None if best is None else guidances(results).index(best.guidance),
        _value_cell(difference, signed=True) if who != BASE else Cell(""),
    )


def _budget(results: Results) -> str:
    return f"size {results.budget.size}, {results.budget.evaluations:,} denoiser evaluations of training a run"


def interval_note(results: Results) -> str:
    """What the intervals are, and how far to trust them with as many seeds as there are."""
    counts = [len(runs_of(results, algorithm)) for algorithm in results.algorithms]
    seeds = min((count for count in counts if count), default=0)
    what = f"Intervals are 95 % percentile bootstraps over seeds, {RESAMPLES:,} resamples."
    if seeds <= 1:
        return f"{what} One seed tells nothing about the spread between seeds, so what rests on one has no interval."
    if seeds <= 3:  # all draws alike has probability 3^-3 = 3.7 % > 2.5 %, so the percentiles are the extremes
        # The extremes of n draws miss a symmetric centre only when all n fall on one side of it.
        cover = round(100 * (1 - 2 ** (1 - seeds)))
        return (
            f"{what} With only {seeds} seeds such an interval is simply the range from the lowest seed to the highest: "
            f"a rough guide, which holds the true mean about {cover} % of the time, not 95 %."
        )
    if seeds < 10:
        return f"{what} With only {seeds} seeds such an interval is a rough guide and tends to be too narrow."
    return what


# ---- galleries and settings


def gallery(results: Results, folder: Path) -> list[Picture]:
    """The pictures as data URIs: the base first, then the algorithms in order, then any other.

    Raises:
        UserError: a file is missing, cannot be read or is not a PNG.
    """
    known = ["base", *results.algorithms]
    order = [name for name in known if name in results.gallery] + [
        name for name in results.gallery if name not in known
    ]
    prompts = "; ".join(results.gallery_prompts)
    pictures = []
    for name in order:
        path = folder / results.gallery[name]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"gallery picture {path}: {error.strerror}; keep the pictures beside results.json or compare again"
            ) from error
        if not data.startswith(_PNG_SIGNATURE):
            raise UserError(f"gallery picture {path}: not a PNG file; run `dgpo-bench compare` again")
        title = "Base" if name == "base" else display_name(name)
        uri = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        pictures.append(Picture(title, uri, f"Samples of {title}, one per prompt: {prompts}"))
    return pictures


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
    """(dotted key, value per algorithm) where the algorithms differ, sorted by key; a dash where one lacks the key."""
    flat = [flatten(mapping) for mapping in settings.values()]
    keys = sorted({key for mapping in flat for key in mapping})
    rows = [(key, [mapping.get(key, _NONE) for mapping in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=110)
