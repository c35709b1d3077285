"""Time to a threshold: how much sooner the challenger reaches what a baseline ended at.

Ratios are taken inside a seed and only then averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..results import Results, Run
from .curves import Axis, curve, final_value, first_crossing, primary_metric, runs_of
from .intervals import Estimate, estimate

Status: TypeAlias = Literal["measured", "not reached", "undefined"]


@dataclass(frozen=True)
class SeedSpeed:
    """How much sooner the challenger was in one seed; times are in units of the axis.

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

    @property
    def status(self) -> Status:
        """What is known over all seeds: ``measured`` has a ratio, ``not reached`` a bound, ``undefined`` neither."""
        if self.bound is not None:
            return "not reached"
        return "undefined" if self.ratio is None else "measured"

    def count(self, status: Status) -> int:
        """How many seeds have a status."""
        return sum(seed.status == status for seed in self.seeds)


def seed_speed(
    baseline: Run, challenger: Run, metric: str, axis: Axis, better: Literal["higher", "lower"]
) -> SeedSpeed | None:
    """The ratio of one seed: the threshold is the baseline's own final value, a side's time its first crossing of it.

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


def speed(results: Results, baseline: str, axis: Axis) -> Speed:
    """How much sooner the challenger reaches the baseline's final primary metric, over the seeds both have run.

    Raises:
        UserError: the primary metric is unusable, or a run's cost goes backwards.
    """
    better, challenger = primary_metric(results).better, results.challenger
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
