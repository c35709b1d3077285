"""Means over seeds and their 95 % percentile-bootstrap intervals.

Differences are taken inside a seed and only then averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..results import Results
from .curves import Array, baselines, final_value, primary_metric, runs_of

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` >= 1 seeds with its 95 % interval; one seed has no interval (both bounds None)."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both bounds, or None for one seed."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Band:
    """Mean curve (X,) over seeds and its pointwise 95 % band (X,) each; one seed has no band (both None)."""

    mean: Array
    low: Array | None
    high: Array | None


def band(values: Array) -> Band:
    """Mean and pointwise 95 % percentile-bootstrap band over seeds.

    Args:
        values: (S, X), one row per seed, S >= 1.

    The generator is seeded and each column is sorted first, so neither a second call nor another order of the seeds
    changes anything. (The band is pointwise: what seeds do jointly at two x does not enter it.)

    Raises:
        ValueError: there is no seed.
    """
    seeds = len(values)
    if seeds == 0:
        raise ValueError("no seed to average over")
    ordered = np.sort(values, axis=0)
    mean = ordered.mean(axis=0)
    if seeds == 1:
        return Band(mean, None, None)
    counts = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    low, high = np.percentile(counts @ ordered / seeds, [2.5, 97.5], axis=0)
    return Band(mean, np.clip(low, ordered[0], ordered[-1]), np.clip(high, ordered[0], ordered[-1]))


def estimate(values: Sequence[float] | Array) -> Estimate:
    """Mean and 95 % interval of one number per seed, (S,), S >= 1.

    Raises:
        ValueError: there is no seed.
    """
    found = band(np.asarray(values, dtype=np.float64)[:, None])
    if found.low is None or found.high is None:
        return Estimate(float(found.mean[0]), None, None, 1)
    return Estimate(float(found.mean[0]), float(found.low[0]), float(found.high[0]), len(values))


def base_estimate(results: Results, metric: str) -> Estimate | None:
    """The untrained base's mean: one value per seed (averaged over the algorithms), then as :func:`estimate`.

    Where every seed measured the same value (same prompts, same noise, same model) there is no spread to speak of,
    and the interval is None rather than of width zero.
    """
    by_seed: dict[int, list[float]] = {}
    for run in results.runs:
        if run.evaluations and metric in run.evaluations[0].metrics:
            by_seed.setdefault(run.seed, []).append(run.evaluations[0].metrics[metric])
    values = [float(np.mean(values)) for values in by_seed.values()]
    if not values:
        return None
    found = estimate(values)
    return Estimate(found.mean, None, None, found.count) if np.allclose(values, values[0], 1e-12, 0) else found


def final_estimate(results: Results, algorithm: str, metric: str) -> Estimate | None:
    """The final value of one algorithm over its seeds; None if no run has one."""
    values = [final_value(run, metric) for run in runs_of(results, algorithm).values()]
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def paired_finals(results: Results, challenger: str, baseline: str, metric: str) -> tuple[Array, Array]:
    """Final values (S,) of both algorithms over the S >= 0 seeds in which both have one."""
    ours, theirs = runs_of(results, challenger), runs_of(results, baseline)
    pairs = [(final_value(ours[seed], metric), final_value(theirs[seed], metric)) for seed in ours if seed in theirs]
    known = np.array([(a, b) for a, b in pairs if a is not None and b is not None], dtype=np.float64).reshape(-1, 2)
    return known[:, 0], known[:, 1]


def paired_difference(results: Results, challenger: str, baseline: str, metric: str) -> Estimate | None:
    """Final value of the challenger minus the baseline's, seed by seed; None if they share no finished seed."""
    ours, theirs = paired_finals(results, challenger, baseline, metric)
    return estimate(ours - theirs) if len(ours) else None


def strongest_baseline(results: Results) -> str | None:
    """The baseline with the best mean final value of the primary metric; None if none has a finished run.

    Raises:
        UserError: the primary metric is unusable.
    """
    sign = 1.0 if primary_metric(results).better == "higher" else -1.0
    finals = {name: final_estimate(results, name, results.primary) for name in baselines(results)}
    known = {name: sign * final.mean for name, final in finals.items() if final is not None}
    return max(known, key=lambda name: known[name]) if known else None
