"""The base and the adapters at every guidance, because a reader can turn that knob without training anything."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Guided, Results
from .statistics import Estimate, estimate, format_number, primary_metric, runs_of

BASE = "base"


@dataclass(frozen=True)
class Best:
    """The guidance at which the base or an algorithm does best on the primary metric, and what it reaches there."""

    guidance: float
    value: Estimate


def guidances(results: Results) -> list[float]:
    """Those that the base was measured at, rising."""
    return [each.guidance for each in results.base]


def guided_values(results: Results, name: str, guidance: float, metric: str) -> dict[int, float]:
    """One value a seed of an algorithm's finished adapters; of the base (``base``) one in all, under seed 0."""
    measured = {0: results.base} if name == BASE else {s: run.guided for s, run in runs_of(results, name).items()}
    found = {seed: _at(each, guidance) for seed, each in measured.items()}
    return {seed: at.metrics[metric] for seed, at in found.items() if at is not None and metric in at.metrics}


def guided_estimate(results: Results, name: str, guidance: float, metric: str) -> Estimate | None:
    """Mean and interval over seeds at one guidance; None where nothing was measured."""
    values = list(guided_values(results, name, guidance, metric).values())
    return estimate(values) if values else None


def best_guidance(results: Results, name: str) -> Best | None:
    """Chosen on the very pictures it is reported on, for the base as for everyone; None where nothing was measured."""
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


def base_sentence(results: Results, algorithm: str, name: str) -> str:
    """What an algorithm gained over the base at the guidance that suits each best; empty where nothing was measured."""
    ours, theirs = best_guidance(results, algorithm), best_guidance(results, BASE)
    found = difference_to_base(results, algorithm, results.primary)
    if ours is None or theirs is None or found is None:
        return ""
    gain = found.mean if primary_metric(results).better == "higher" else -found.mean
    unclear = found.low is not None and found.high is not None and found.low <= 0 <= found.high
    judged = (
        "is not clearly ahead of"
        if unclear
        else "is ahead of"
        if gain > 0
        else "is level with"
        if gain == 0
        else "is behind"
    )
    spread = "one seed, no interval"
    if found.low is not None and found.high is not None:
        spread = f"{format_number(found.low)} to {format_number(found.high)}"
    return (
        f"Each at its own best guidance, {name} ({ours.guidance:g}) {judged} the untrained base "
        f"({theirs.guidance:g}): {format_number(ours.value.mean)} against {format_number(theirs.value.mean)} "
        f"(difference {format_number(found.mean)}, {spread})."
    )


def _at(measured: list[Guided], guidance: float) -> Guided | None:
    return next((each for each in measured if each.guidance == guidance), None)
