"""Which figures a report has: the headline against every cost, against drift, across domains, by kind of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import BASE, NO_SEED, CellRecord, MetricRecord
from .comparison import Comparison, Role
from .drawing import Labels, Path, PointsRow, paths_figure, points_figure
from .intervals import Array
from .measures import curve_values, on_curve, value, value_at
from .numbers import time_unit
from .speed import AXES, Axis, axes_of, cost
from .tables import BETTER, ROLES, about_best, best_label


@dataclass(frozen=True)
class FigureGroup:
    """Figures that are read together.

    Attributes:
        about: how to read them.
        figures: SVG elements; every label inside is escaped.
    """

    title: str
    about: str
    figures: list[str]


def figure_groups(comparison: Comparison) -> list[FigureGroup]:
    """All figures in the order of the page; a group without any is left out."""
    label = comparison.results.metrics[comparison.results.task.headline].label
    groups = [
        FigureGroup(
            f"{label}, every seed",
            "A dot is a seed, the upright bar their mean, the wide line the 95 % interval for these adapters and new "
            f"prompts. Each at its own guidance.{about_best(comparison)}",
            [figure for role in ROLES if (figure := ends_figure(comparison, role))],
        ),
        FigureGroup(
            f"{label} against cost",
            "Small marks are seeds, lines their mean. Dashed: the untrained base at its best guidance. All points are "
            f"means over the same pictures, at guidance {comparison.results.sampling.guidance:g}.",
            [figure for axis in axes_of(comparison) if (figure := cost_figure(comparison, axis))],
        ),
        FigureGroup(
            f"{label} against drift",
            "Drift is the mean squared difference of the velocity from the base's on the base's own pictures: how far "
            "an adapter went for what it gained.",
            [figure for figure in [drift_figure(comparison)] if figure],
        ),
        FigureGroup(
            "What the gain cost",
            "A path runs from the base through the checkpoints to the large mark, which is the value in the table "
            "above. One that leaves the base's height in the bad direction has paid for its reward elsewhere.",
            tradeoff_figures(comparison),
        ),
        FigureGroup(
            f"{label} by kind of prompt", "In domain, as above, one figure for each kind.", tag_figures(comparison)
        ),
        FigureGroup(
            "Tuning",
            "The best setting so far against how many were tried, on validation prompts.",
            [figure for figure in [tuning_figure(comparison)] if figure],
        ),
    ]
    return [group for group in groups if group.figures]


def ends_figure(comparison: Comparison, role: Role) -> str:
    """Where every entry and the base ended, with the seeds as points; empty where nothing was measured."""
    metric = comparison.results.metrics[comparison.results.task.headline]
    rows = []
    for index, entry in enumerate([BASE, *comparison.results.entries], start=-1):
        headline, best = comparison.results.task.headline, list(comparison.best(entry).values())
        ends = {comparison.label(entry): value(comparison, entry, role, headline)}
        ends |= {best_label(comparison, entry): value_at(comparison, best, role, headline)} if best else {}
        for label, found in ends.items():
            if found is not None:
                interval = None if found.prompts is None else (found.prompts.low, found.prompts.high)
                rows.append(PointsRow(label, index, found.points, found.mean, interval))
    title = f"{metric.label}, {ROLES[role].lower()}, by method and seed"
    return points_figure(Labels(title, f"{ROLES[role]}: {metric_name(metric)}", "", counts=False), rows) if rows else ""


def cost_figure(comparison: Comparison, axis: Axis, tag: str | None = None) -> str:
    """The headline in domain against a cost; empty where nothing was trained."""
    headline = comparison.results.task.headline
    points = [point for cell in comparison.results.cells for point in cell.checkpoints]
    scale, unit = 1.0, AXES[axis]
    if axis == "total_seconds":
        scale, word, _ = time_unit(max((cost(point, axis) or 0.0 for point in points), default=0.0))
        unit = f"{unit}, {word}"

    def at(cell: CellRecord) -> tuple[Array, Array]:
        indices, values = curve_values(comparison, cell, "in_domain", headline, tag)
        return np.array([cost(cell.checkpoints[i], axis) or 0.0 for i in indices]) / scale, values

    base = on_curve(comparison, comparison.finished(BASE)[NO_SEED], "in_domain", headline, tag)
    metric = comparison.results.metrics[headline]
    title = f"{metric.label} against {unit}" + ("" if tag is None else f", {tag or 'no kind'}")
    label = metric_name(metric) if tag is None else f"{tag or 'no kind'}: {metric_name(metric)}"
    paths = _paths(comparison, at)
    return paths_figure(Labels(title, unit, label), paths, base, "Base, best") if paths else ""


def drift_figure(comparison: Comparison) -> str:
    """The headline in domain against drift; empty where drift was not measured."""
    headline = comparison.results.task.headline

    def at(cell: CellRecord) -> tuple[Array, Array]:
        indices, values = curve_values(comparison, cell, "in_domain", headline)
        drifts = [cell.checkpoints[i].drift for i in indices]
        known = [i for i, drift in enumerate(drifts) if drift is not None]
        return np.array([drifts[i] for i in known], dtype=np.float64), values[known]

    metric = comparison.results.metrics[headline]
    paths = [path for path in _paths(comparison, at) if len(path.x) > 1]
    labels = Labels(f"{metric.label} against drift", "drift from the base", metric_name(metric))
    return paths_figure(labels, paths) if paths else ""


def tradeoff_figures(comparison: Comparison) -> list[str]:
    """Every other measure against the headline in domain, the headline on out-of-domain prompts first."""
    results = comparison.results
    headline = results.task.headline
    wanted: list[tuple[Role, str]] = [("out_of_domain", headline)]
    for name in results.metrics:
        if name != headline and comparison.measured(name):
            inside = value(comparison, BASE, "in_domain", name) is not None
            wanted.append(("in_domain" if inside else "out_of_domain", name))
    found = [_tradeoff(comparison, role, name) for role, name in wanted]
    return [figure for figure in found if figure]


def _tradeoff(comparison: Comparison, role: Role, metric: str) -> str:
    """One measure against the headline by checkpoint, ending at the values of the table."""
    results = comparison.results
    headline = results.task.headline

    def at(cell: CellRecord) -> tuple[Array, Array]:
        across, x = curve_values(comparison, cell, "in_domain", headline)
        upwards, y = curve_values(comparison, cell, role, metric)
        both = [i for i in across if i in upwards and i < len(cell.checkpoints) - 1]
        return x[[across.index(i) for i in both]], y[[upwards.index(i) for i in both]]

    paths = []
    for path in _paths(comparison, at, single=True):
        entry = list(results.entries)[path.index]
        ends = value(comparison, entry, "in_domain", headline), value(comparison, entry, role, metric)
        if ends[0] is not None and ends[1] is not None:
            x, y = np.append(path.x, ends[0].mean), np.append(path.y, ends[1].mean)
            paths.append(Path(path.label, path.index, x, y, strong=path.strong, end=True))
    base = value(comparison, BASE, "in_domain", headline), value(comparison, BASE, role, metric)
    if base[0] is not None and base[1] is not None:
        point = np.array([base[0].mean]), np.array([base[1].mean])
        paths.append(Path("Base, best", -1, *point, end=True))
    if len(paths) < 2:
        return ""
    first, second = results.metrics[headline], results.metrics[metric]
    labels = Labels(
        f"{second.label}, {ROLES[role].lower()}, against {first.label}",
        f"In domain: {metric_name(first)}",
        f"{ROLES[role]}: {metric_name(second)}",
        counts=False,
    )
    return paths_figure(labels, paths)


def tag_figures(comparison: Comparison) -> list[str]:
    """The headline in domain against denoiser evaluations, a figure for each kind of prompt where there are several."""
    tags: dict[str, None] = {}
    for name in comparison.sets_of("in_domain"):
        tags |= {prompt.tag: None for prompt in comparison.results.sets[name].prompts}
    if len(tags) < 2:
        return []
    found = [cost_figure(comparison, "denoiser_evaluations", tag) for tag in tags]
    return [figure for figure in found if figure]


def tuning_figure(comparison: Comparison) -> str:
    """The best trial so far of every entry; empty without trials."""
    results, paths = comparison.results, []
    for index, (entry, record) in enumerate(results.entries.items()):
        trials = sorted((t for t in results.trials if t.entry == entry), key=lambda trial: trial.number)
        values = np.array([np.nan if t.value is None else t.value for t in trials], dtype=np.float64)
        known = np.isfinite(values)
        if known.any():
            best = comparison.sign * np.maximum.accumulate(comparison.sign * values[known])
            numbers = (1 + np.flatnonzero(known)).astype(np.float64)
            points = np.stack([numbers, values[known]], axis=1)
            paths.append(Path(record.label, index, numbers, best, points, entry == results.challenger))
    metric = results.metrics[results.task.headline]
    labels = Labels("Best setting so far against trials", "settings tried", f"on validation: {metric_name(metric)}")
    return paths_figure(labels, paths) if paths else ""


def _paths(comparison: Comparison, at: Callable[[CellRecord], tuple[Array, Array]], single: bool = False) -> list[Path]:
    """A path for each entry: the n-th points of its seeds averaged, as far as the shortest goes.

    Args:
        at: a cell's points x (E,) and y (E,).
        single: whether a path of no point is one too.
    """
    found = []
    for index, (entry, record) in enumerate(comparison.results.entries.items()):
        curves = [at(cell) for cell in comparison.results.cells_of(entry).values() if cell.checkpoints]
        length = min((len(x) for x, _ in curves), default=0)
        if not curves or (length == 0 and not single):
            continue
        mean: Array = np.stack([np.stack(curve)[:, :length] for curve in curves]).mean(axis=0)
        points = _seeds(curves) if len(curves) > 1 else None
        found.append(Path(record.label, index, mean[0], mean[1], points, entry == comparison.results.challenger))
    return found


def _seeds(curves: Sequence[tuple[Array, Array]]) -> Array:
    return np.concatenate([np.stack(curve, axis=1) for curve in curves])


def metric_name(metric: MetricRecord) -> str:
    """A metric's label and direction."""
    return f"{metric.label} ({BETTER[metric.better].partition(' ')[2]})"
