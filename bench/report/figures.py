"""The report's figures as inline SVG: deterministic, self-contained, several to a page without clashing ids."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..results import Metric, Results, Run
from .curves import Array, Axis, curve, curves_on_grid, runs_of
from .intervals import band, base_estimate
from .numbers import time_unit

# Okabe and Ito's palette and two more, told apart with any color vision; in turn for who has no color of the preset's.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
_LINES = ("-.", (0, (1, 1.2)), (0, (6, 1.5)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("s", "^", "D", "v", "P")
_BASE_COLOR = "#555555"
_BETTER = {"higher": "higher is better", "lower": "lower is better", "none": "as the base is best"}

_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own font
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
}


def algorithm_colors(results: Results) -> dict[str, str]:
    """One hex color per algorithm, the same in every figure of a report: the preset's, else the next that is free."""
    given = {name: color for name, color in results.colors.items() if name in results.algorithms}
    taken = {color.upper() for color in given.values()}
    free = itertools.cycle([color for color in _COLORS if color not in taken] or _COLORS)
    return {name: given[name] if name in given else next(free) for name in results.algorithms}


def metric_figure(results: Results, metric: str, axis: Axis, name: str) -> str:
    """One metric against cost: mean line with its 95 % band over seeds, thin lines per seed, the base dashed.

    Args:
        name: unique within the page; every id inside the picture starts with it.
    """
    meaning = results.metrics[metric]
    runs = {algorithm: list(runs_of(results, algorithm).values()) for algorithm in results.algorithms}
    ends = [run.evaluations[-1] for group in runs.values() for run in group if run.evaluations]
    largest = max((getattr(end, axis) for end in ends), default=0.0)
    scale, unit = 1.0, "denoiser evaluations"
    if axis == "seconds":
        scale, unit = time_unit(largest)[0], f"training {time_unit(largest)[1]}"
    with _style(name):
        figure, axes = _figure()
        for look in _looks(results):
            _draw_runs(axes, runs[look.algorithm], metric, axis, scale, look)
        base = base_estimate(results, metric)
        if base is not None:
            axes.axhline(base.mean, color=_BASE_COLOR, linestyle=(0, (4, 3)), linewidth=1, label="Base", zorder=1.5)
        axes.set_xlabel(unit)
        axes.set_ylabel(_axis_label(meaning))
        if axis == "denoiser_evaluations":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.margins(x=0.01)
        _legend(axes, results)
        return _svg(figure, name, f"{meaning.label} against {unit}, by algorithm")


def tradeoff_figure(results: Results, metric: str, name: str) -> str:
    """An out-of-domain metric (y) against the primary one (x): a path of evaluations per algorithm, mean over seeds.

    The n-th evaluations of the seeds are averaged; a path ends where the shortest run does. The large point is the end.
    """
    across, upwards = results.metrics[results.primary], results.metrics[metric]
    with _style(name):
        figure, axes = _figure()
        for look in _looks(results):
            x, y = _mean_path(list(runs_of(results, look.algorithm).values()), results.primary, metric)
            if not len(x):
                continue
            axes.plot(
                x, y, color=look.color, linestyle=look.line, linewidth=look.width, marker=look.marker, markersize=3
            )
            end: dict[str, Any] = {"marker": look.marker, "markersize": 8, "linestyle": "none", "label": look.label}
            axes.plot(x[-1:], y[-1:], color=look.color, **end)
        base = base_estimate(results, results.primary), base_estimate(results, metric)
        if base[0] is not None and base[1] is not None:
            star: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "none", "label": "Base"}
            axes.plot([base[0].mean], [base[1].mean], color=_BASE_COLOR, **star)
        axes.set_xlabel(_axis_label(across))
        axes.set_ylabel(_axis_label(upwards))
        _legend(axes, results)
        return _svg(figure, name, f"{upwards.label} against {across.label}, by algorithm")


@dataclass(frozen=True)
class _Look:
    """How one algorithm is drawn: color, line and marker all differ, so print in gray still reads."""

    algorithm: str
    label: str
    color: str
    line: Any
    marker: str
    width: float


def _looks(results: Results) -> list[_Look]:
    """Every algorithm's look, in the order of drawing: the challenger stands out, and over the others."""
    colors, others = algorithm_colors(results), [name for name in results.algorithms if name != results.challenger]
    looks = [
        _Look(name, results.label(name), colors[name], _LINES[i % len(_LINES)], _MARKERS[i % len(_MARKERS)], 1.5)
        for i, name in enumerate(others)
    ]
    if results.challenger in results.algorithms:
        name = results.challenger
        looks.append(_Look(name, results.label(name), colors[name], "-", "o", 2.2))
    return looks


def _draw_runs(axes: Axes, runs: Sequence[Run], metric: str, axis: Axis, scale: float, look: _Look) -> None:
    """Draw one algorithm: a thin line per seed, then their mean and its band."""
    if not runs:
        return
    if len(runs) > 1:
        for run in runs:
            x, y = curve(run, metric, axis)
            axes.plot(x / scale, y, color=look.color, linewidth=0.6, alpha=0.45)
    grid, values = curves_on_grid(runs, metric, axis)
    if not len(grid):
        return
    found = band(values)
    axes.plot(grid / scale, found.mean, color=look.color, linestyle=look.line, linewidth=look.width, label=look.label)
    if found.low is not None and found.high is not None:
        axes.fill_between(grid / scale, found.low, found.high, color=look.color, alpha=0.16, linewidth=0)


def _mean_path(runs: Sequence[Run], across: str, upwards: str) -> tuple[Array, Array]:
    """The path x (E,) and y (E,) of the n-th evaluations that carry both metrics, averaged over the runs."""
    paths = [
        [
            (e.metrics[across], e.metrics[upwards])
            for e in run.evaluations
            if across in e.metrics and upwards in e.metrics
        ]
        for run in runs
    ]
    length = min((len(path) for path in paths), default=0)
    if length == 0:
        return np.empty(0), np.empty(0)
    mean = np.array([path[:length] for path in paths], dtype=np.float64).mean(axis=0)
    return mean[:, 0], mean[:, 1]


def _axis_label(metric: Metric) -> str:
    """A metric's label and direction, on two lines where one would be longer than the axis."""
    return f"{metric.label}{chr(10) if len(metric.label) > 24 else ' '}({_BETTER[metric.better]})"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _legend(axes: Axes, results: Results) -> None:
    """Draw the legend in the order of the results, whatever the order of drawing; nothing when nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    order = [results.label(algorithm) for algorithm in results.algorithms] + ["Base"]
    ranked = sorted(zip(labels, handles, strict=True), key=lambda pair: order.index(pair[0]))
    if ranked:
        axes.legend([handle for _, handle in ranked], [label for label, _ in ranked])


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever the user's matplotlibrc says, plus ours; put back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        yield


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element to put into HTML as it is: no prolog, no metadata, no outside name or address."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None  # matplotlib always writes it
    # Both name outside addresses or style the whole page: the metadata a vocabulary, the style block every element.
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"font-family: [^;\">]+; ?", "", body)  # the page's font
    label = re.sub(r"[&<>\"']", lambda match: f"&#{ord(match.group())};", description)
    style = "stroke-linejoin:round;stroke-linecap:butt"
    return f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}" style="{style}">{body.strip()}\n'
