"""The base and the adapters at every guidance, because a reader can turn that knob without training anything."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Results
from .curves import primary_metric, runs_of
from .intervals import Estimate, estimate
from .numbers import format_bounds, format_number

BASE = "base"


@dataclass(frozen=True)
class Best:
    """The guidance at which the base or an algorithm does best on the primary metric, and what it reaches there."""

    guidance: float
    value: Estimate


def guidances(results: Results) -> list[float]:
    """The guidances that the base was measured at, rising."""
    return [each.guidance for each in results.base]


def guided_values(results: Results, name: str, guidance: float, metric: str) -> dict[int, float]:
    """One value per seed of an algorithm's finished adapters; of the base (``base``) one in all, under seed 0."""
    measured = {0: results.base} if name == BASE else {s: run.guided for s, run in runs_of(results, name).items()}
    return {
        seed: each.metrics[metric]
        for seed, guided in measured.items()
        for each in guided
        if each.guidance == guidance and metric in each.metrics
    }


def guided_estimate(results: Results, name: str, guidance: float, metric: str) -> Estimate | None:
    """Mean and interval over seeds at one guidance; None where nothing was measured."""
    values = list(guided_values(results, name, guidance, metric).values())
    return estimate(values) if values else None


def best_guidance(results: Results, name: str) -> Best | None:
    """The guidance that suits the base or an algorithm best; None where nothing was measured.

    It is chosen on the very pictures it is reported on, for the base as for everyone.

    Raises:
        UserError: the primary metric is unusable.
    """
    sign = 1.0 if primary_metric(results).better == "higher" else -1.0
    measured = [(g, guided_estimate(results, name, g, results.primary)) for g in guidances(results)]
    known = [Best(guidance, value) for guidance, value in measured if value is not None]
    return max(known, key=lambda best: sign * best.value.mean) if known else None


def difference_to_base(results: Results, algorithm: str, metric: str) -> Estimate | None:
    """An algorithm at its best guidance less the base at its own, seed by seed, on any metric."""
    ours, theirs = best_guidance(results, algorithm), best_guidance(results, BASE)
    if ours is None or theirs is None:
        return None
    values = guided_values(results, algorithm, ours.guidance, metric)
    base = guided_values(results, BASE, theirs.guidance, metric)
    return estimate([value - base[0] for value in values.values()]) if values and base else None


def base_sentence(results: Results, algorithm: str) -> str:
    """What an algorithm gained over the base at the guidance that suits each best; empty where nothing was measured."""
    ours, theirs = best_guidance(results, algorithm), best_guidance(results, BASE)
    difference = difference_to_base(results, algorithm, results.primary)
    if ours is None or theirs is None or difference is None:
        return ""
    gain = difference.mean if primary_metric(results).better == "higher" else -difference.mean
    if difference.interval is not None and difference.interval[0] <= 0 <= difference.interval[1]:
        judged = "is not clearly ahead of"
    else:
        judged = "is ahead of" if gain > 0 else "is level with" if gain == 0 else "is behind"
    return (
        f"Each at its own best guidance, {results.label(algorithm)} ({ours.guidance:g}) {judged} the untrained base "
        f"({theirs.guidance:g}): {format_number(ours.value.mean)} against {format_number(theirs.value.mean)} "
        f"(difference {format_number(difference.mean)}, {format_bounds(difference)})."
    )
