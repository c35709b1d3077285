"""Lines and points as inline SVG that takes its colors from the page, so that it is dark where the page is.

Written as text: the same numbers give the same bytes, nothing is fetched, and a figure takes no time to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from .intervals import Array
from .numbers import format_amount

LEAST_SPAN = 0.2
"""An axis of values spans at least so much of the largest of them: a change of 1.6 % must not fill the height."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _LINE = 400.0, 250.0, 48.0, 12.0, 30.0, 16.0
_FONT, _LETTER = 11, 7.0
"""Size of the text, and about how wide a letter of it is."""
_DASHES = ("", "8 3 2 3", "2 2", "9 3", "6 2 2 2 2 2", "4 4")
Point = tuple[float, float]


@dataclass(frozen=True)
class Path:
    """One entry's line.

    Attributes:
        index: of the entry, for its color, line and mark; -1 for the base.
        x, y: (E,) each.
        points: (x, y) of single seeds, drawn small; (K, 2).
        intervals: (E, 2), what each point's upright line spans; NaN for none.
        strong: drawn thick, and last.
        end: whether the last point is a large mark.
    """

    label: str
    index: int
    x: Array
    y: Array
    points: Array | None = None
    strong: bool = False
    end: bool = False
    intervals: Array | None = None


@dataclass(frozen=True)
class PointsRow:
    """One entry's seeds, their mean, and an interval of it."""

    label: str
    index: int
    points: Sequence[float]
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Labels:
    """What a figure says.

    Attributes:
        title: for who cannot see it.
        counts: whether x is a count, from 0; else it is a value, of which an axis spans a least share.
    """

    title: str
    x: str
    y: str
    counts: bool = True


@dataclass(frozen=True)
class Scale:
    """Where the values from ``low`` to ``high`` lie between two places of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside, four to nine of them."""
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def paths_figure(labels: Labels, paths: Sequence[Path], level: float | None = None, level_label: str = "") -> str:
    """Lines with their seeds' points, and a dashed level across, as an <svg> element; text stays text."""
    xs = [value for path in paths for value in (*path.x, *(() if path.points is None else path.points[:, 0]))]
    ys = [value for path in paths for value in (*path.y, *(() if path.points is None else path.points[:, 1]))]
    ys += [value for path in paths if path.intervals is not None for value in path.intervals.ravel() if value == value]
    ys += [] if level is None else [level]
    left, right = (0.0, max(max(xs), 1e-12) * 1.02) if labels.counts else value_span(xs)
    low, high = value_span(ys)
    x, y = Scale(left, right, _LEFT, _WIDTH - _RIGHT), Scale(low, high, _HEIGHT - 42, _TOP)
    parts = [*_axis_x(x, y.start, y.end, labels), *_axis_y(y, labels.y)]
    if level is not None:
        parts.append(_line([(x.start, y(level)), (x.end, y(level))], "var(--entry-base)", 1, "4 3"))
    for path in sorted(paths, key=lambda path: path.strong):
        parts += _path(path, x, y)
    items = [(path.label, path.index, path.strong, path.end) for path in paths]
    legend, rows = _legend(items, level_label if level is not None else "")
    return _svg(labels.title, _HEIGHT + rows * _LINE, [*parts, *legend])


def points_figure(labels: Labels, rows: Sequence[PointsRow]) -> str:
    """One line an entry, from the top: its seeds as points, their mean as a bar, the interval as a wide line."""
    bottom = _TOP + 26 * len(rows)
    values = [value for row in rows for value in (*row.points, row.mean, *(row.interval or ()))]
    left = min(160.0, 14 + _LETTER * max(len(row.label) for row in rows))
    low, high = value_span(values)
    x = Scale(low, high, left, _WIDTH - _RIGHT)
    parts = _axis_x(x, bottom, _TOP - 8, labels)
    for line, row in enumerate(rows):
        y, color = _TOP + 26 * line + 8, _color(row.index)
        parts.append(_text(left - 6, y + 4, row.label, "end"))
        if row.interval is not None:
            ends = [(x(row.interval[0]), y), (x(row.interval[1]), y)]
            parts.append(_line(ends, color, 6, "", opacity=0.35))
        parts += [_mark(x(point), y, row.index, 3.2) for point in row.points]
        parts.append(_line([(x(row.mean), y - 8), (x(row.mean), y + 8)], color, 2, ""))
    return _svg(labels.title, bottom + 42, parts)


def value_span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis of values: around them with a margin, and not less than a fifth of the largest."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low)
    largest = max(abs(low), abs(high))
    least = max(LEAST_SPAN * largest, 1e-9) if largest else 1.0  # zeros alone say nothing of a scale
    half = max((high - low) / 2 + margin, least / 2)
    return (low + high) / 2 - half, (low + high) / 2 + half


def _axis_x(x: Scale, bottom: float, top: float, labels: Labels) -> list[str]:
    write = format_amount if labels.counts else _decimals(x)
    parts = []
    for tick in x.ticks():
        parts.append(_line([(x(tick), bottom), (x(tick), top)], "var(--grid)", 0.6, ""))
        parts.append(_text(x(tick), bottom + 14, write(tick), "middle"))
    parts.append(_line([(x.start, bottom), (x.end, bottom)], "var(--edge)", 1, ""))
    parts.append(_text((x.start + x.end) / 2, bottom + 31, labels.x, "middle"))
    return parts


def _axis_y(y: Scale, label: str) -> list[str]:
    write, parts = _decimals(y), []
    for tick in y.ticks():
        parts.append(_line([(_LEFT, y(tick)), (_WIDTH - _RIGHT, y(tick))], "var(--grid)", 0.6, ""))
        parts.append(_text(_LEFT - 5, y(tick) + 4, write(tick), "end"))
    parts.append(_line([(_LEFT, y.start), (_LEFT, y.end)], "var(--edge)", 1, ""))
    parts.append(_text(4, 14, label, "start"))
    return parts


def _decimals(scale: Scale) -> Callable[[float], str]:
    """Ticks written with as many decimals as tell them apart."""
    ticks = scale.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = next((d for d in range(12) if abs(round(step, d) - step) < 1e-9 * abs(step)), 12)
    return lambda value: f"{value + 0.0:.{digits}f}"


def _path(path: Path, x: Scale, y: Scale) -> list[str]:
    color, parts = _color(path.index), []
    for first, second in () if path.points is None else path.points:
        parts.append(_mark(x(first), y(second), path.index, 1.8, opacity=0.55))
    for at, (low, high) in zip(
        path.x, () if path.intervals is None else path.intervals, strict=path.intervals is not None
    ):
        if low == low:
            parts.append(_line([(x(at), y(low)), (x(at), y(high))], color, 4, "", opacity=0.3))
    line = [(x(a), y(b)) for a, b in zip(path.x, path.y, strict=True)]
    parts.append(_line(line, color, 2.6 if path.strong else 1.6, _dash(path.index)))
    parts += [_mark(a, b, path.index, 2.6) for a, b in line]
    if path.end and line:
        parts.append(_mark(*line[-1], path.index, 6.0))
    return parts


def _legend(items: Sequence[tuple[str, int, bool, bool]], level_label: str) -> tuple[list[str], int]:
    """The parts of the legend, and in how many rows they are under the figure."""
    parts, left, row = [], 8.0, 0
    entries = [*items, *([(level_label, -1, False, False)] if level_label else [])]
    for label, index, strong, end in entries:
        width = 38 + _LETTER * len(label)
        if left > 8 and left + width > _WIDTH:
            left, row = 8.0, row + 1
        y = _HEIGHT + 4 + row * _LINE
        dash = "4 3" if index < 0 else _dash(index)
        if not (index < 0 and end):
            parts.append(_line([(left, y), (left + 20, y)], _color(index), 2.6 if strong else 1.6, dash))
        if index >= 0 or end:
            parts.append(_mark(left + 10, y, index, 3.0))
        parts.append(_text(left + 25, y + 4, label, "start"))
        left += width
    return parts, row + 1


def _color(index: int) -> str:
    return "var(--entry-base)" if index < 0 else f"var(--entry-{index})"


def _dash(index: int) -> str:
    return _DASHES[max(index, 0) % len(_DASHES)]


def _line(points: Sequence[Point], color: str, width: float, dash: str, opacity: float = 1.0) -> str:
    places = " ".join(f"{_round(x)},{_round(y)}" for x, y in points)
    style = f"stroke:{color};stroke-width:{width}" + (f";stroke-dasharray:{dash}" if dash else "")
    style += f";opacity:{opacity}" if opacity < 1 else ""
    return f'<polyline points="{places}" style="fill:none;{style}"/>'


def _mark(x: float, y: float, index: int, size: float, opacity: float = 1.0) -> str:
    """A mark whose shape tells the entry where its color cannot: a circle, a square, triangles, a rhomb, a star."""
    color = f"fill:{_color(index)}" + (f";opacity:{opacity}" if opacity < 1 else "")
    shape = index % 5 if index >= 0 else 5
    if shape == 0:
        return f'<circle cx="{_round(x)}" cy="{_round(y)}" r="{_round(size)}" style="{color}"/>'
    turns = {
        1: [(45 + 90 * i, 1.25) for i in range(4)],
        2: [(-90 + 120 * i, 1.4) for i in range(3)],
        3: [(90 * i, 1.4) for i in range(4)],
        4: [(90 + 120 * i, 1.4) for i in range(3)],
        5: [(-90 + 36 * i, 1.5 if i % 2 == 0 else 0.7) for i in range(10)],
    }[shape]
    corners = [(x + size * r * math.cos(math.radians(a)), y + size * r * math.sin(math.radians(a))) for a, r in turns]
    places = " ".join(f"{_round(a)},{_round(b)}" for a, b in corners)
    return f'<polygon points="{places}" style="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    """Text in the page's color; squeezed where it would leave the picture."""
    room = {"start": _WIDTH - x, "end": x, "middle": 2 * min(x, _WIDTH - x)}[anchor]
    squeeze = f' textLength="{_round(room)}" lengthAdjust="spacingAndGlyphs"' if _LETTER * len(text) > room else ""
    return f'<text x="{_round(x)}" y="{_round(y)}" text-anchor="{anchor}"{squeeze}>{escape(text)}</text>'


def _round(value: float) -> str:
    """Two decimals, and never a minus zero, so that the last bits of a sum change no byte."""
    return f"{round(float(value), 2) + 0.0:.4g}" if np.isfinite(value) else "0"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    style = f"font-size:{_FONT}px;fill:currentColor;stroke-linejoin:round"
    head = (
        f'<svg viewBox="0 0 {_round(_WIDTH)} {_round(height)}" role="img" aria-label="{escape(title)}" style="{style}">'
    )
    return "\n".join([head, *parts, "</svg>"])
