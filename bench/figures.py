"""The report's figures as inline SVG: deterministic, self-contained, several to a page without clashing ids."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .results import Metric, Results, Run
from .statistics import CHALLENGER, Array, Axis, band, base_estimate, curve, curves_on_grid, display_name, runs_of

# Okabe and Ito's palette, told apart with any colour vision; the warm vermilion is DGPO's and stands out.
_COLOURS = {CHALLENGER: "#D55E00", "flow-grpo": "#0072B2", "flow-grpo-fast": "#009E73"}
_SPARE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
_LINES = ("-.", (0, (1, 1.2)), (0, (6, 1.5)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("s", "^", "D", "v", "P")
_BASE_COLOUR = "#555555"
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


def colours(algorithms: Sequence[str]) -> dict[str, str]:
    """One hex colour per algorithm, the same in every figure of a report."""
    others = [algorithm for algorithm in algorithms if algorithm not in _COLOURS]
    spare = {algorithm: _SPARE_COLOURS[i % len(_SPARE_COLOURS)] for i, algorithm in enumerate(others)}
    return {algorithm: _COLOURS.get(algorithm) or spare[algorithm] for algorithm in algorithms}


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
        for algorithm in _salient_last(results.algorithms):
            _draw_runs(axes, runs[algorithm], metric, axis, scale, _look(results, algorithm))
        base = base_estimate(results, metric)
        if base is not None:
            axes.axhline(base.mean, color=_BASE_COLOUR, linestyle=(0, (4, 3)), linewidth=1, label="Base", zorder=1.5)
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
        for algorithm in _salient_last(results.algorithms):
            x, y = _mean_path(list(runs_of(results, algorithm).values()), results.primary, metric)
            look = _look(results, algorithm)
            if len(x):
                axes.plot(
                    x, y, color=look.colour, linestyle=look.line, linewidth=look.width, marker=look.marker, markersize=3
                )
                axes.plot(
                    x[-1:],
                    y[-1:],
                    color=look.colour,
                    marker=look.marker,
                    markersize=8,
                    linestyle="none",
                    label=look.label,
                )
        bases = base_estimate(results, results.primary), base_estimate(results, metric)
        if bases[0] is not None and bases[1] is not None:
            axes.plot(
                [bases[0].mean],
                [bases[1].mean],
                color=_BASE_COLOUR,
                marker="*",
                markersize=11,
                linestyle="none",
                label="Base",
            )
        axes.set_xlabel(_axis_label(across))
        axes.set_ylabel(_axis_label(upwards))
        _legend(axes, results)
        return _svg(figure, name, f"{upwards.label} against {across.label}, by algorithm")


class _Look:
    """How one algorithm is drawn: colour, line and marker all differ, so print in grey still reads."""

    def __init__(self, algorithm: str, colour: str, index: int) -> None:
        salient = algorithm == CHALLENGER
        self.label, self.colour = display_name(algorithm), colour
        self.line = "-" if salient else _LINES[index % len(_LINES)]
        self.marker = "o" if salient else _MARKERS[index % len(_MARKERS)]
        self.width = 2.2 if salient else 1.5


def _look(results: Results, algorithm: str) -> _Look:
    others = [other for other in results.algorithms if other != CHALLENGER]
    index = others.index(algorithm) if algorithm in others else 0
    return _Look(algorithm, colours(results.algorithms)[algorithm], index)


def _salient_last(algorithms: Sequence[str]) -> list[str]:
    """DGPO is drawn over the others."""
    return sorted(algorithms, key=lambda algorithm: algorithm == CHALLENGER)


def _draw_runs(axes: Axes, runs: Sequence[Run], metric: str, axis: Axis, scale: float, look: _Look) -> None:
    if not runs:
        return
    if len(runs) > 1:
        for run in runs:
            x, y = curve(run, metric, axis)
            axes.plot(x / scale, y, color=look.colour, linewidth=0.6, alpha=0.45)
    grid, values = curves_on_grid(runs, metric, axis)
    if not len(grid):
        return
    found = band(values)
    axes.plot(grid / scale, found.mean, color=look.colour, linestyle=look.line, linewidth=look.width, label=look.label)
    if found.low is not None and found.high is not None:
        axes.fill_between(grid / scale, found.low, found.high, color=look.colour, alpha=0.16, linewidth=0)


def _mean_path(runs: Sequence[Run], across: str, upwards: str) -> tuple[Array, Array]:
    """x (E,) and y (E,): the n-th evaluations that carry both metrics, averaged over the runs."""
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
    """On two lines where one would be longer than the axis."""
    return f"{metric.label}{chr(10) if len(metric.label) > 24 else ' '}({_BETTER[metric.better]})"


def time_unit(largest: float) -> tuple[float, str, int]:
    """(seconds in one unit, its name, decimals worth showing) for times up to ``largest`` seconds."""
    if largest < 300:
        return 1.0, "seconds", 1
    return (60.0, "minutes", 2) if largest < 3 * 3600 else (3600.0, "hours", 3)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _legend(axes: Axes, results: Results) -> None:
    """In the order of the results, whatever the order of drawing; nothing when nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    order = [display_name(algorithm) for algorithm in results.algorithms] + ["Base"]
    ranked = sorted(zip(labels, handles, strict=True), key=lambda pair: order.index(pair[0]))
    if ranked:
        axes.legend([handle for _, handle in ranked], [label for label, _ in ranked])


@contextmanager
def _style(name: str) -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's matplotlibrc says, plus ours; everything put back afterwards."""
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
