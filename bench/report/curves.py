"""The curves of a comparison: what each run measured against what it had cost by then.

A seed is the unit: both algorithms of one seed see the same prompts and the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.errors import UserError

from ..results import Evaluation, Metric, Results, Run

Array: TypeAlias = NDArray[np.float64]
Axis: TypeAlias = Literal["seconds", "denoiser_evaluations"]


def primary_metric(results: Results) -> Metric:
    """The metric that the verdict and the time to a threshold are about.

    Raises:
        UserError: it is unknown, or has no good direction and so no threshold to reach.
    """
    metric = results.metrics.get(results.primary)
    if metric is None:
        raise UserError(f"results: primary metric {results.primary!r} is not among the metrics {list(results.metrics)}")
    if metric.better == "none":
        raise UserError(f"results: primary metric {results.primary!r} has no better direction; choose higher or lower")
    return metric


def runs_of(results: Results, algorithm: str) -> dict[int, Run]:
    """The runs of one algorithm by seed, in the order of ``results.seeds``."""
    found = {run.seed: run for run in results.runs if run.algorithm == algorithm}
    return {seed: found[seed] for seed in results.seeds if seed in found}


def missing_runs(results: Results) -> list[tuple[str, int]]:
    """The (algorithm, seed) of every run that was planned and is not in the file."""
    present = {(run.algorithm, run.seed) for run in results.runs}
    return [(a, s) for a in results.algorithms for s in results.seeds if (a, s) not in present]


def baselines(results: Results) -> list[str]:
    """Every planned algorithm but the challenger, in order."""
    return [algorithm for algorithm in results.algorithms if algorithm != results.challenger]


def curve(run: Run, metric: str, axis: Axis) -> tuple[Array, Array]:
    """The measured points (x, y), each (E,), of the evaluations that carry ``metric``.

    Raises:
        UserError: x goes backwards, so the run's file was put together wrongly.
    """
    carrying = [evaluation for evaluation in run.evaluations if metric in evaluation.metrics]
    x = np.array([_position(evaluation, axis) for evaluation in carrying], dtype=np.float64)
    if np.any(np.diff(x) < 0):
        raise UserError(f"results: run {run.algorithm} seed {run.seed}: {axis} goes backwards between evaluations")
    return x, np.array([evaluation.metrics[metric] for evaluation in carrying], dtype=np.float64)


def common_grid(curves: Sequence[tuple[Array, Array]], points: int = 200) -> Array:
    """Evenly spaced x (points,) inside the range that *every* curve covers; empty if there is no such range."""
    if not curves or any(len(x) == 0 for x, _ in curves):
        return np.empty(0)
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    return np.linspace(start, end, points) if start < end else np.empty(0)


def interpolate(x: Array, y: Array, grid: Array) -> Array:
    """A curve, ``y`` (E,) at ``x`` (E,), read linearly at ``grid`` (X,).

    Raises:
        ValueError: the grid leaves [x[0], x[-1]]; nothing is ever extrapolated.
    """
    if len(grid) and (len(x) == 0 or grid.min() < x[0] or grid.max() > x[-1]):
        raise ValueError("the grid leaves the range of the curve")
    return np.interp(grid, x, y) if len(grid) else np.empty(0)


def curves_on_grid(runs: Sequence[Run], metric: str, axis: Axis, points: int = 200) -> tuple[Array, Array]:
    """The common grid (X,) of ``runs`` and their curves on it (S, X); X = 0 if they share no range.

    Raises:
        UserError: x goes backwards in one of them.
    """
    curves = [curve(run, metric, axis) for run in runs]
    grid = common_grid(curves, points)
    values = [interpolate(x, y, grid) for x, y in curves]
    return grid, np.array(values, dtype=np.float64).reshape(len(runs), len(grid))


def final_value(run: Run, metric: str) -> float | None:
    """The mean of the last two evaluations, to lessen the luck of one.

    The base (the first evaluation) never counts: with one trained evaluation that one stands alone, with none the
    answer is None.
    """
    trained = [evaluation.metrics[metric] for evaluation in run.evaluations[1:] if metric in evaluation.metrics]
    return float(np.mean(trained[-2:])) if trained else None


def _position(evaluation: Evaluation, axis: Axis) -> float:
    return evaluation.seconds if axis == "seconds" else float(evaluation.denoiser_evaluations)


def first_crossing(x: Array, y: Array, threshold: float, better: Literal["higher", "lower"]) -> float | None:
    """Where the curve, straight between its points, first meets the threshold; None for "not reached".

    Args:
        x, y: (E,) each, x not decreasing. No running best is taken: a curve that touches the threshold and falls
            again has touched it, at the place where the straight line did.
    """
    sign = 1.0 if better == "higher" else -1.0
    gap = sign * (y - threshold)
    reached = np.flatnonzero(gap >= 0)
    if len(reached) == 0:
        return None
    i = int(reached[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (gap[i - 1] / (gap[i - 1] - gap[i])))
