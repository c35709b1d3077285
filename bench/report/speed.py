"""How soon a threshold is reached, as far as evaluations can tell: a crossing lies somewhere between two of them.

Thresholds are the task's, the same for everyone. A crossing must hold at the next evaluation. What was not reached by
the last evaluation is later than that, and enters as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..records import BASE, NO_SEED, CellRecord, Checkpoint
from .comparison import Comparison
from .intervals import LEAST_SEEDS, Array, Estimate, Interval, new_run
from .measures import curve_values, difference, on_curve

Axis: TypeAlias = Literal["flops", "denoiser_evaluations", "total_seconds", "images_scored", "steps"]
AXES: dict[Axis, str] = {
    "flops": "measured FLOPs of the denoiser",
    "denoiser_evaluations": "denoiser evaluations",
    "total_seconds": "training time",
    "images_scored": "images scored",
    "steps": "optimizer steps",
}
"""What a cost is called, the budget's own units first."""


@dataclass(frozen=True)
class Crossing:
    """When a threshold was met, in units of the axis: after ``after`` and at the latest at ``by``.

    ``by`` is infinite where it was not reached; both are 0 where the untrained base is there already.
    """

    after: float
    by: float

    @property
    def reached(self) -> bool:
        """Whether it was."""
        return math.isfinite(self.by)


@dataclass(frozen=True)
class Ratio:
    """How many times as much a baseline spent as the challenger, between two bounds; 0 and infinity are no bounds.

    Attributes:
        low, high: of the geometric mean over seeds, from where the crossings can lie.
        runs: the same for a new run, wider by the spread between seeds; None with fewer than five seeds, or where a
            bound is missing in some seed.
    """

    low: float
    high: float
    runs: Interval | None


@dataclass(frozen=True)
class ThresholdSpeed:
    """One threshold of one baseline on one axis.

    Attributes:
        base_there: the untrained base meets it at its best guidance: guidance alone gets there.
        challenger, baseline: their crossings by seed, of the seeds that both finished.
        ratio: None where it is undefined: the base is there at the guidance of the curves, nobody of the two came, or
            the evaluations are too far apart to bound it (both came before the first).
    """

    threshold: float
    base_there: bool
    challenger: dict[int, Crossing]
    baseline: dict[int, Crossing]
    ratio: Ratio | None


@dataclass(frozen=True)
class Speed:
    """The challenger against one baseline on one axis.

    Attributes:
        challenger_gain, baseline_gain: over the untrained base, each at its best guidance; positive is better.
        defined: whether the lower 95 % bound of the baseline's gain is above 0; where it is not, there is nothing to be
            sooner at, and no threshold has a ratio.
    """

    baseline: str
    axis: Axis
    challenger_gain: Estimate | None
    baseline_gain: Estimate | None
    defined: bool
    thresholds: list[ThresholdSpeed]


def crossing(costs: Array | Sequence[float], values: Array | Sequence[float], threshold: float) -> Crossing:
    """Where a curve meets a threshold and still does at the next evaluation.

    Args:
        costs: (E,), not falling.
        values: (E,), more is better.

    A threshold met at the last evaluation alone has no next one to hold at, and so was not reached.
    """
    met = [value >= threshold for value in values]
    for i in range(len(met) - 1):
        if met[i] and met[i + 1]:
            return Crossing(float(costs[i - 1]) if i else 0.0, float(costs[i]) if i else 0.0)
    below = [float(cost) for cost, there in zip(costs, met, strict=True) if not there]
    return Crossing(below[-1] if below else 0.0, math.inf)


def ratio(challenger: Sequence[Crossing], baseline: Sequence[Crossing]) -> Ratio | None:
    """The geometric mean over seeds of the baseline's cost over the challenger's, as far as it is known.

    Args:
        challenger, baseline: (S,) each, the same seeds.

    Returns:
        None without a seed, where either starts at the threshold, or where neither bound is known.
    """
    if not challenger or any(each.by == 0 for each in (*challenger, *baseline)):
        return None
    with np.errstate(divide="ignore"):
        lows = np.log([b.after / c.by for c, b in zip(challenger, baseline, strict=True)])
        highs = np.log(
            [math.inf if c.after == 0 else b.by / c.after for c, b in zip(challenger, baseline, strict=True)]
        )
    low, high = float(np.exp(lows.mean())), float(np.exp(highs.mean()))
    if low == 0 and math.isinf(high):
        return None
    runs = None
    if len(lows) >= LEAST_SEEDS and np.isfinite(lows).all() and np.isfinite(highs).all():
        below, above = new_run(lows), new_run(highs)
        assert below is not None
        assert above is not None
        runs = Interval(math.exp(below.low), math.exp(above.high))
    return Ratio(low, high, runs)


def cost(checkpoint: Checkpoint, axis: Axis) -> float | None:
    """What a checkpoint had cost on an axis; None where it was not measured."""
    found = getattr(checkpoint, axis)
    return None if found is None else float(found)


def axes_of(comparison: Comparison) -> list[Axis]:
    """The axes on which every checkpoint of every finished cell has a cost, the budget's own first.

    None where nothing was trained: adapters that were made elsewhere have cost nothing here that is known.
    """
    points = [point for cell in comparison.results.cells if cell.status == "done" for point in cell.checkpoints]
    costs = {axis: [cost(point, axis) for point in points] for axis in AXES}
    return [axis for axis, found in costs.items() if None not in found and any(found)]


def gain(comparison: Comparison, entry: str) -> Estimate | None:
    """An entry's headline in domain over the untrained base's, each at its best guidance; positive is better."""
    found = difference(comparison, entry, BASE, "in_domain", comparison.results.task.headline)
    return found if found is None or comparison.sign > 0 else found.reversed()


def speed(comparison: Comparison, baseline: str, axis: Axis) -> Speed:
    """The challenger against one baseline at every threshold of the task."""
    results = comparison.results
    ours, theirs = gain(comparison, results.challenger), gain(comparison, baseline)
    defined = theirs is not None and theirs.low is not None and theirs.low > 0
    # Of the very pictures that crossings are read from, which may be fewer than those of the tables.
    base = on_curve(comparison, comparison.finished(BASE)[NO_SEED], "in_domain", results.task.headline)
    found = []
    for threshold in results.task.thresholds:
        first = _crossings(comparison, results.challenger, axis, threshold)
        second = _crossings(comparison, baseline, axis, threshold)
        seeds = [seed for seed in first if seed in second]
        first, second = {s: first[s] for s in seeds}, {s: second[s] for s in seeds}
        there = base is not None and comparison.sign * (base - threshold) >= 0
        measured = ratio(list(first.values()), list(second.values())) if defined else None
        found.append(ThresholdSpeed(threshold, there, first, second, measured))
    return Speed(baseline, axis, ours, theirs, defined, found)


def _crossings(comparison: Comparison, entry: str, axis: Axis, threshold: float) -> dict[int, Crossing]:
    found = {}
    for seed, cell in comparison.results.cells_of(entry).items():
        costs, values = curve(comparison, cell, axis)
        if len(values) > 1:
            found[seed] = crossing(costs, comparison.sign * values, comparison.sign * threshold)
    return found


def curve(comparison: Comparison, cell: CellRecord, axis: Axis) -> tuple[Array, Array]:
    """A cell's headline in domain against what it had cost: costs (E,) and values (E,)."""
    indices, values = curve_values(comparison, cell, "in_domain", comparison.results.task.headline)
    costs = [cost(cell.checkpoints[i], axis) for i in indices]
    known = [i for i, each in enumerate(costs) if each is not None]
    return np.array([costs[i] for i in known], dtype=np.float64), values[known]
