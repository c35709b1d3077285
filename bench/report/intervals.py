"""Two intervals of a mean, each with its own question: other prompts for these adapters, or another run of training.

Pure functions on arrays. A difference is taken inside a prompt and a noise before anything is averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array: TypeAlias = NDArray[np.float64]
RESAMPLES = 4_000
LEAST_SEEDS = 5
"""Below so many seeds the spread between them says too little for an interval: the points alone are shown."""
LEAST_PROMPTS = 8
"""Below so many prompts a percentile bootstrap is far too narrow: nothing is drawn that was not among those few."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and seeds, or a difference of two.

    Attributes:
        mean: over the prompts of each seed, then over seeds.
        points: the mean of each seed, in the order of the seeds.
        prompts: the interval *these adapters, new prompts*; None with fewer than eight prompts.
        runs: the interval *a new run*; None with fewer than five seeds.
    """

    mean: float
    points: tuple[float, ...]
    prompts: Interval | None
    runs: Interval | None

    @property
    def low(self) -> float | None:
        """The lower of the lower bounds that are known."""
        return min((each.low for each in (self.prompts, self.runs) if each is not None), default=None)

    @property
    def high(self) -> float | None:
        """The higher of the upper bounds that are known."""
        return max((each.high for each in (self.prompts, self.runs) if each is not None), default=None)

    def reversed(self) -> Estimate:
        """The same with the opposite sign, so that a gain is positive where lower is better."""

        def turn(interval: Interval | None) -> Interval | None:
            return None if interval is None else Interval(-interval.high, -interval.low)

        return Estimate(-self.mean, tuple(-point for point in self.points), turn(self.prompts), turn(self.runs))


def estimate(values: Array, tags: Sequence[str]) -> Estimate:
    """A mean over prompts and seeds with both intervals.

    Args:
        values: (S, P), a prompt's mean over its pictures for each seed, S >= 1 and P >= 1; or differences of such,
            already taken noise by noise.
        tags: (P,), the kind of each prompt.

    Raises:
        ValueError: there is no seed or no prompt, or a value is not a number.
    """
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}: expected seeds x prompts, all finite")
    points = values.mean(axis=1)
    return Estimate(
        float(points.mean()),
        tuple(float(point) for point in points),
        new_prompts(values.mean(axis=0), tags),
        new_run(points),
    )


def new_prompts(values: Array, tags: Sequence[str]) -> Interval | None:
    """The interval of a mean over prompts, for the same adapters: a percentile bootstrap inside tags, seeded.

    Of a tag's n prompts n - 1 are drawn with replacement, which makes the variance of the mean unbiased however small
    the tag is (McCarthy and Snowden 1985; Rao and Wu 1988); tags of a single prompt are drawn as one.

    Args:
        values: (P,).
        tags: (P,).

    Returns:
        None for fewer than eight prompts.
    """
    if len(values) < LEAST_PROMPTS:
        return None
    low, high = np.percentile(_draws(tuple(tags)) @ values, [2.5, 97.5])
    return Interval(float(low), float(high))


def new_run(points: Array | Sequence[float]) -> Interval | None:
    """The interval of a mean over seeds: Student's t, so it is about another run on the same prompts.

    Args:
        points: (S,), one mean a seed.

    Returns:
        None with fewer than five seeds.
    """
    values = np.asarray(points, dtype=np.float64)
    if len(values) < LEAST_SEEDS:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def headline_prompts(tags: Sequence[str], least: int) -> NDArray[np.bool_]:
    """Which prompts count for the headline, (P,): those whose tag has at least ``least`` of them."""
    counts = {tag: sum(other == tag for other in tags) for tag in set(tags)}
    return np.array([counts[tag] >= least for tag in tags], dtype=np.bool_)


def probability_of_improvement(worlds: Sequence[tuple[Array, Array]]) -> tuple[float, Interval | None]:
    """How likely a run of the first method is better than a run of the second one, averaged over worlds.

    In each world the share of pairs of runs in which the first is better, a tie counting half (Agarwal et al. 2021,
    arXiv 2108.13264, section 4.3; rliable's ``metrics.probability_of_improvement``), with the interval of a bootstrap
    over runs inside worlds.

    Args:
        worlds: scores (S,) and (T,) of each, higher is better.

    Returns:
        The probability in [0, 1], and its interval; None where some world has a single run of either.

    Raises:
        ValueError: there is no world, or one without runs.
    """
    if not worlds or any(not len(first) or not len(second) for first, second in worlds):
        raise ValueError("no runs to compare")
    wins = [np.sign(first[:, None] - second[None, :]) / 2 + 0.5 for first, second in worlds]
    mean = float(np.mean([win.mean() for win in wins]))
    if any(min(win.shape) < 2 for win in wins):
        return mean, None
    generator, drawn = np.random.default_rng(0), np.zeros(RESAMPLES)
    for win in wins:
        rows, columns = (generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in win.shape)
        drawn += np.einsum("ri,ij,rj->r", rows, win, columns) / len(wins)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return mean, Interval(float(low), float(high))


@functools.lru_cache(maxsize=8)
def _draws(tags: tuple[str, ...]) -> Array:
    """The weight of each prompt in each resample, (R, P); every row sums to one."""
    generator, kinds = np.random.default_rng(0), np.array(tags)
    alone = [tag for tag in dict.fromkeys(tags) if tags.count(tag) == 1]
    groups = [np.flatnonzero(kinds == tag) for tag in dict.fromkeys(tags) if tag not in alone]
    if alone:
        groups.append(np.flatnonzero(np.isin(kinds, alone)))
    weights = np.zeros((RESAMPLES, len(tags)))
    for group in groups:
        n = len(group)
        if n == 1:  # the one tag of one prompt: it cannot vary
            weights[:, group] = 1 / len(tags)
            continue
        counts = generator.multinomial(n - 1, np.full(n, 1 / n), size=RESAMPLES)
        weights[:, group] = counts * (n / (n - 1) / len(tags))
    return weights
