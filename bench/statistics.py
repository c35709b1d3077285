"""What a comparison says, as pure functions: curves, intervals over seeds, time to a threshold, one honest sentence.

Every interval is a 95 % percentile bootstrap over seeds. A seed is the unit: both algorithms of one seed see the same
prompts and the same noise, so differences and ratios are taken inside a seed and only then averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.errors import UserError

from .results import Evaluation, Metric, Results, Run

Array: TypeAlias = NDArray[np.float64]
Axis: TypeAlias = Literal["seconds", "denoiser_evaluations"]
Status: TypeAlias = Literal["measured", "not reached", "undefined"]

CHALLENGER = "dgpo"
RESAMPLES = 10_000
_DISPLAY_NAMES = {"dgpo": "DGPO", "flow-grpo": "Flow-GRPO", "flow-grpo-fast": "Flow-GRPO-Fast"}


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` >= 1 seeds with its 95 % interval; one seed has no interval (both bounds None)."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Band:
    """Mean curve (X,) over seeds and its pointwise 95 % band (X,) each; one seed has no band (both None)."""

    mean: Array
    low: Array | None
    high: Array | None


@dataclass(frozen=True)
class SeedSpeed:
    """One seed of a speed ratio; times are in units of the axis.

    Attributes:
        threshold: the baseline's own final value in this seed.
        baseline_at: where the baseline first reaches it; never missing, see :func:`seed_speed`.
        challenger_at: where the challenger first reaches it, None if it does not.
        ratio: ``baseline_at / challenger_at`` > 0, above 1 when the challenger is sooner; None unless measured.
        bound: for ``not reached``, the ratio is below this: the challenger needs more than its whole run.
        status: ``undefined`` when the untrained base already meets the threshold: the baseline gained nothing.
    """

    seed: int
    threshold: float
    baseline_at: float
    challenger_at: float | None
    ratio: float | None
    bound: float | None
    status: Status


@dataclass(frozen=True)
class Speed:
    """How much sooner the challenger reaches a baseline's final value, over seeds.

    Attributes:
        ratio: geometric mean over the measured seeds, with the interval of the log ratio, exponentiated. None when
            the challenger missed the threshold in any seed (leaving that seed out would flatter it) or none measured.
        bound: when it missed in some seed, the geometric mean is below this. None otherwise.
    """

    baseline: str
    challenger: str
    axis: Axis
    seeds: tuple[SeedSpeed, ...]
    ratio: Estimate | None
    bound: float | None

    def count(self, status: Status) -> int:
        return sum(seed.status == status for seed in self.seeds)


# ---- names and numbers


def display_name(algorithm: str) -> str:
    """An algorithm's name for people; one that is not known stands as it is."""
    return _DISPLAY_NAMES.get(algorithm, algorithm)


def format_number(value: float) -> str:
    """Three decimals below 10, fewer above, two significant digits for what would otherwise read as zero."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


def format_ratio(value: float) -> str:
    """Two significant digits, as few as a ratio of times from a handful of seeds deserves."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# ---- reading runs


def primary_metric(results: Results) -> Metric:
    """Raises UserError: the primary metric is unknown, or has no good direction and so no threshold to reach."""
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
    """(algorithm, seed) of every run that was planned and is not in the file."""
    present = {(run.algorithm, run.seed) for run in results.runs}
    return [(a, s) for a in results.algorithms for s in results.seeds if (a, s) not in present]


def baselines(results: Results) -> list[str]:
    """Every planned algorithm but DGPO, in order."""
    return [algorithm for algorithm in results.algorithms if algorithm != CHALLENGER]


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
    """``y`` (E,) at ``x`` (E,) read linearly at ``grid`` (X,).

    Raises:
        ValueError: the grid leaves [x[0], x[-1]]; nothing is ever extrapolated.
    """
    if len(grid) and (len(x) == 0 or grid.min() < x[0] or grid.max() > x[-1]):
        raise ValueError("the grid leaves the range of the curve")
    return np.interp(grid, x, y) if len(grid) else np.empty(0)


def curves_on_grid(runs: Sequence[Run], metric: str, axis: Axis, points: int = 200) -> tuple[Array, Array]:
    """The common grid (X,) of ``runs`` and their curves on it (S, X); X = 0 if they share no range."""
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


# ---- intervals over seeds


def band(values: Array) -> Band:
    """Mean and pointwise 95 % percentile-bootstrap band over seeds.

    Args:
        values: (S, X), one row a seed, S >= 1.

    The generator is seeded and each column is sorted first, so neither a second call nor another order of the seeds
    changes anything. (The band is pointwise: what seeds do jointly at two x does not enter it.)
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
    """Mean and 95 % interval of one number per seed, (S,), S >= 1."""
    found = band(np.asarray(values, dtype=np.float64)[:, None])
    if found.low is None or found.high is None:
        return Estimate(float(found.mean[0]), None, None, 1)
    return Estimate(float(found.mean[0]), float(found.low[0]), float(found.high[0]), len(values))


def base_estimate(results: Results, metric: str) -> Estimate | None:
    """The untrained base: one value a seed (averaged over the algorithms), then as :func:`estimate`.

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
    """Final value of one algorithm over its seeds; None if no run has one."""
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
    """The other algorithm with the best mean final value of the primary metric; None if none has a finished run."""
    sign = 1.0 if primary_metric(results).better == "higher" else -1.0
    finals = {name: final_estimate(results, name, results.primary) for name in baselines(results)}
    known = {name: sign * final.mean for name, final in finals.items() if final is not None}
    return max(known, key=lambda name: known[name]) if known else None


# ---- time to a threshold


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


def seed_speed(
    baseline: Run, challenger: Run, metric: str, axis: Axis, better: Literal["higher", "lower"]
) -> SeedSpeed | None:
    """One seed: the baseline's own final value is the threshold, and each side's first crossing of it is its time.

    The baseline is timed at its own first crossing, not at its whole budget: a baseline that has been flat since
    half time gets credit for having arrived early, which makes the ratio conservative. It always crosses, because
    one of the two last values is at least their mean. Returns None if either run has no trained evaluation.
    """
    threshold = final_value(baseline, metric)
    if threshold is None or final_value(challenger, metric) is None:
        return None
    (x_base, y_base), (x_ours, y_ours) = curve(baseline, metric, axis), curve(challenger, metric, axis)
    theirs, ours = first_crossing(x_base, y_base, threshold, better), first_crossing(x_ours, y_ours, threshold, better)
    if theirs is None:  # only rounding of the mean can do this: the last two values are equal to the last bit
        theirs = float(x_base[-1])
    if theirs <= x_base[0] or (ours is not None and ours <= x_ours[0]):  # at the start, so a time of zero
        return SeedSpeed(baseline.seed, threshold, theirs, ours, None, None, "undefined")
    if ours is None:
        return SeedSpeed(baseline.seed, threshold, theirs, None, None, theirs / float(x_ours[-1]), "not reached")
    return SeedSpeed(baseline.seed, threshold, theirs, ours, theirs / ours, None, "measured")


def speed(results: Results, baseline: str, axis: Axis, challenger: str = CHALLENGER) -> Speed:
    """How much sooner the challenger reaches the baseline's final primary metric, over the seeds both have run."""
    better = primary_metric(results).better
    assert better != "none"  # primary_metric refuses it
    theirs, ours = runs_of(results, baseline), runs_of(results, challenger)
    pairs = [seed_speed(theirs[s], ours[s], results.primary, axis, better) for s in theirs if s in ours]
    seeds = tuple(pair for pair in pairs if pair is not None)
    logs = np.log([seed.ratio for seed in seeds if seed.ratio is not None])
    bounds = np.log([seed.bound for seed in seeds if seed.bound is not None])
    if len(bounds):
        return Speed(baseline, challenger, axis, seeds, None, float(np.exp(np.mean([*logs, *bounds]))))
    if not len(logs):
        return Speed(baseline, challenger, axis, seeds, None, None)
    log = estimate(logs)
    low, high = (None if bound is None else float(np.exp(bound)) for bound in (log.low, log.high))
    return Speed(baseline, challenger, axis, seeds, Estimate(float(np.exp(log.mean)), low, high, log.count), None)


# ---- the verdict


def verdict(results: Results) -> str:
    """One plain sentence: DGPO against every other algorithm, in denoiser evaluations, the unit of the budget."""
    absent = missing_runs(results)
    planned = len(results.algorithms) * len(results.seeds)
    prefix = ""
    if absent or not results.complete:
        prefix = f"Incomplete comparison ({planned - len(absent)} of {planned} runs): "
    metric, name = primary_metric(results), display_name(CHALLENGER)
    label = metric.label if metric.label[1:2].isupper() else metric.label[:1].lower() + metric.label[1:]
    final, base = final_estimate(results, CHALLENGER, results.primary), base_estimate(results, results.primary)
    if final is None:
        others = ", ".join(display_name(other) for other in baselines(results)) or "no other algorithm"
        there = "there" if prefix else "There"
        return f"{prefix}{there} is no finished {name} run, so nothing to compare with {others}."
    strongest = strongest_baseline(results)
    if strongest is None:
        start = f" from a base at {format_number(base.mean)}" if base else ""
        tail = f"{_seed_note(final)} but there is no finished run of another algorithm to compare it with."
        return f"{prefix}{name} ended at {label} {format_number(final.mean)}{start} {tail}"
    ordered = [strongest, *(other for other in baselines(results) if other != strongest)]
    clauses = []
    for index, other in enumerate(ordered):
        note = ", the strongest baseline," if index == 0 and len(ordered) > 1 else ""
        subject, what = (name, f"the final {label}") if index == 0 else ("it", "that")
        clauses.append(_clause(results, metric, other, subject, what, note))
    return f"{prefix}{'; '.join(clauses)}."


def _clause(results: Results, metric: Metric, other: str, subject: str, what: str, note: str) -> str:
    """The part of the verdict about one baseline: how soon, and where both ended."""
    ours, theirs = paired_finals(results, CHALLENGER, other, results.primary)
    if not len(ours):
        return f"{subject} shares no finished seed with {display_name(other)}, so the two are not compared"
    sooner = _speed_phrase(speed(results, other, "denoiser_evaluations"), what, f"{display_name(other)}{note}")
    difference = estimate(ours - theirs)
    gain = difference.mean if metric.better == "higher" else -difference.mean
    judged = "" if gain > 0 else " level," if gain == 0 else " worse,"
    interval = "one seed, no interval"
    if difference.low is not None and difference.high is not None:
        judged = ", not clearly different," if difference.low <= 0 <= difference.high else judged
        interval = _bounds(difference)
    ended = f"ended{judged} at {format_number(float(ours.mean()))} against {format_number(float(theirs.mean()))}"
    return f"{subject} {sooner} and {ended} (difference {format_number(difference.mean)}, {interval})"


def _speed_phrase(found: Speed, what: str, theirs: str) -> str:
    total, missed, undefined = len(found.seeds), found.count("not reached"), found.count("undefined")
    if found.bound is not None:
        where = f"in {missed} of {_seeds(total)}" if total > 1 else "in its one seed"
        bound = f"a speed ratio of at most {format_ratio(found.bound)}x"
        return f"did not reach {what} of {theirs} {where} ({bound})"
    if found.ratio is None:
        return f"has no speed ratio to {theirs} because the untrained base already met {what}"
    left_out = f", {undefined} left out where the untrained base already met it" if undefined else ""
    ratio = found.ratio
    if ratio.mean >= 1:
        how = f"with {format_ratio(ratio.mean)}x fewer denoiser evaluations"
        return f"reached {what} of {theirs} {how} ({_ratio_note(ratio)}{left_out})"
    slower = Estimate(1 / ratio.mean, ratio.high and 1 / ratio.high, ratio.low and 1 / ratio.low, ratio.count)
    how = f"took {format_ratio(slower.mean)}x as many denoiser evaluations"
    return f"{how} to reach {what} of {theirs} ({_ratio_note(slower)}{left_out})"


def _ratio_note(ratio: Estimate) -> str:
    if ratio.low is None or ratio.high is None:
        return "one seed, no interval"
    unclear = ": no clear difference" if ratio.low <= 1 <= ratio.high else ""
    return f"95 % interval {format_ratio(ratio.low)} to {format_ratio(ratio.high)}, {_seeds(ratio.count)}{unclear}"


def _bounds(found: Estimate) -> str:
    assert found.low is not None
    assert found.high is not None
    return f"{format_number(found.low)} to {format_number(found.high)}"


def _seed_note(found: Estimate) -> str:
    return (
        "(one seed, no interval)" if found.low is None else f"(95 % interval {_bounds(found)}, {_seeds(found.count)})"
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
