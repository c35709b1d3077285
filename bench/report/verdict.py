"""The verdict of a comparison: one honest sentence about the challenger and every baseline."""

from __future__ import annotations

from ..results import Metric, Results
from .curves import baselines, missing_runs, primary_metric
from .intervals import Estimate, base_estimate, estimate, final_estimate, paired_finals, strongest_baseline
from .numbers import format_bounds, format_number, format_ratio
from .thresholds import Speed, speed


def verdict(results: Results) -> str:
    """The challenger against every baseline, in denoiser evaluations, the unit of the budget.

    Raises:
        UserError: the primary metric is unusable.
    """
    metric, absent = primary_metric(results), missing_runs(results)
    incomplete = bool(absent) or not results.complete
    planned = len(results.algorithms) * len(results.seeds)
    prefix = f"Incomplete comparison ({planned - len(absent)} of {planned} runs): " if incomplete else ""
    final = final_estimate(results, results.challenger, results.primary)
    if final is None:
        name = results.label(results.challenger)
        others = ", ".join(results.label(other) for other in baselines(results)) or "no other algorithm"
        there = "there" if incomplete else "There"
        return f"{prefix}{there} is no finished {name} run, so nothing to compare with {others}."
    strongest = strongest_baseline(results)
    if strongest is None:
        return prefix + _alone(results, metric, final)
    return prefix + _against_baselines(results, metric, strongest)


def _alone(results: Results, metric: Metric, final: Estimate) -> str:
    """Where the challenger ended, when nothing else did."""
    base = base_estimate(results, results.primary)
    start = f" from a base at {format_number(base.mean)}" if base else ""
    spread = format_bounds(final)
    if final.interval is not None:
        spread = f"95 % interval {spread}, {_seeds(final.count)}"
    return (
        f"{results.label(results.challenger)} ended at {_in_sentence(metric)} {format_number(final.mean)}{start} "
        f"({spread}) but there is no finished run of another algorithm to compare it with."
    )


def _against_baselines(results: Results, metric: Metric, strongest: str) -> str:
    """A clause for each baseline, the strongest first."""
    others = [other for other in baselines(results) if other != strongest]
    subject, value = results.label(results.challenger), f"the final {_in_sentence(metric)}"
    note = ", the strongest baseline," if others else ""
    clauses = [_clause(results, metric, strongest, (subject, value, note))]
    clauses += [_clause(results, metric, other, ("it", "that", "")) for other in others]
    return f"{'; '.join(clauses)}."


def _clause(results: Results, metric: Metric, baseline: str, words: tuple[str, str, str]) -> str:
    """How soon the challenger reached one baseline's final value, and where both ended.

    Args:
        words: what the challenger, the value and (as a note behind its name) the baseline are called.
    """
    subject, value, note = words
    ours, theirs = paired_finals(results, results.challenger, baseline, results.primary)
    if not len(ours):
        return f"{subject} shares no finished seed with {results.label(baseline)}, so the two are not compared"
    sooner = _speed_phrase(speed(results, baseline, "denoiser_evaluations"), value, f"{results.label(baseline)}{note}")
    difference = estimate(ours - theirs)
    gain = difference.mean if metric.better == "higher" else -difference.mean
    judged = "" if gain > 0 else " level," if gain == 0 else " worse,"
    if difference.interval is not None and difference.interval[0] <= 0 <= difference.interval[1]:
        judged = ", not clearly different,"
    ended = f"ended{judged} at {format_number(float(ours.mean()))} against {format_number(float(theirs.mean()))}"
    return f"{subject} {sooner} and {ended} (difference {format_number(difference.mean)}, {format_bounds(difference)})"


def _speed_phrase(measured: Speed, value: str, baseline: str) -> str:
    """How much sooner or later a baseline's final value was reached, if it was."""
    total, undefined = len(measured.seeds), measured.count("undefined")
    if measured.status == "undefined":
        return f"has no speed ratio to {baseline} because the untrained base already met {value}"
    if measured.bound is not None:
        where = f"in {measured.count('not reached')} of {_seeds(total)}" if total > 1 else "in its one seed"
        return f"did not reach {value} of {baseline} {where} (a speed ratio of at most {format_ratio(measured.bound)}x)"
    ratio = measured.ratio
    assert ratio is not None  # it is measured
    left_out = f", {undefined} left out where the untrained base already met it" if undefined else ""
    if ratio.mean >= 1:
        how = f"with {format_ratio(ratio.mean)}x fewer denoiser evaluations"
        return f"reached {value} of {baseline} {how} ({_ratio_note(ratio)}{left_out})"
    slower = Estimate(1 / ratio.mean, ratio.high and 1 / ratio.high, ratio.low and 1 / ratio.low, ratio.count)
    how = f"took {format_ratio(slower.mean)}x as many denoiser evaluations"
    return f"{how} to reach {value} of {baseline} ({_ratio_note(slower)}{left_out})"


def _ratio_note(ratio: Estimate) -> str:
    if ratio.interval is None:
        return "one seed, no interval"
    low, high = ratio.interval
    unclear = ": no clear difference" if low <= 1 <= high else ""
    return f"95 % interval {format_ratio(low)} to {format_ratio(high)}, {_seeds(ratio.count)}{unclear}"


def _in_sentence(metric: Metric) -> str:
    """A metric's label in the middle of a sentence: without its capital, unless it is an abbreviation."""
    label = metric.label
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
