"""What a comparison found, in sentences that a reader who is no statistician understands."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..records import BASE, NO_SEED, MetricRecord
from .comparison import Comparison, Role, missing_cells, read_comparison, small_tags
from .intervals import Estimate
from .measures import difference, gain_over_base, shared_seeds, value, value_at
from .numbers import count, format_between, format_bounds, format_guidances, format_interval, format_number
from .speed import AXES, axes_of, speed

ROLES: tuple[Role, ...] = ("in_domain", "out_of_domain")
Judgement = Literal["better", "not worse", "slightly worse", "worse", "not clear", "no interval"]


def judge(gain: Estimate, margin: float | None = None) -> Judgement:
    """What a gain (positive is better) shows, by the lowest and the highest bound of its intervals.

    Args:
        margin: a loss up to it counts as none, by the lower bound; None asks for better or worse alone.
    """
    if gain.low is None or gain.high is None:
        return "no interval"
    if gain.low > 0:
        return "better"
    if margin is not None and gain.low > -margin:
        return "not worse" if gain.high >= 0 else "slightly worse"
    return "worse" if gain.high < 0 else "not clear"


def conclusions(folder: Path) -> list[str]:
    """The sentences at the top of a folder's report, the headline first.

    Raises:
        UserError: the folder's results cannot be read.
    """
    comparison = read_comparison(folder)
    return [headline(comparison), *rivals(comparison), *cautions(comparison)]


def headline(comparison: Comparison) -> str:
    """The challenger against the untrained base at its best guidance, in and out of domain, in one sentence."""
    results = comparison.results
    absent = len(missing_cells(results))
    planned = len(results.entries) * len(results.seeds)
    prefix = f"Incomplete ({planned - absent} of {planned} cells): " if absent or not results.complete else ""
    name = results.entries[results.challenger].label if results.challenger in results.entries else results.challenger
    if not comparison.finished(results.challenger):
        return f"{prefix}{'there' if prefix else 'There'} is no finished {name} run, so nothing is compared."
    return prefix + _sentence(comparison, BASE)


def rivals(comparison: Comparison) -> list[str]:
    """The challenger against every other algorithm, a sentence each, and how soon it got there."""
    found = []
    if comparison.finished(comparison.results.challenger):
        for name, entry in comparison.results.entries.items():
            if entry.kind == "algorithm" and name != comparison.results.challenger:
                found += [_sentence(comparison, name), speed_sentence(comparison, name)]
    return [sentence for sentence in found if sentence]


def _sentence(comparison: Comparison, other: str) -> str:
    """The challenger against one other entry, or the base, on both axes."""
    results, name = comparison.results, comparison.results.challenger
    if other != BASE and not shared_seeds(comparison, name, other):
        return f"{comparison.label(other)} shares no finished seed with {comparison.label(name)}: not compared."
    ours, theirs = (
        format_guidances(place[3] for place in comparison.finished(entry).values()) for entry in (name, other)
    )
    rival = f"{comparison.label(other)} at guidance {theirs}"
    if other == BASE:
        best = "its best guidance" if results.base_guidance is not None else "the curves' guidance"
        rival = f"the untrained base at {best} ({theirs})"
    inside, outside = _clause(comparison, other, "in_domain"), _clause(comparison, other, "out_of_domain")
    return f"{comparison.label(name)} at guidance {ours}, against {rival}: {inside}; {outside}."


def _clause(comparison: Comparison, other: str, role: Role) -> str:
    """Where the challenger and another entry ended on the prompts of one role, and what that shows."""
    results = comparison.results
    task, where = results.task, "in domain" if role == "in_domain" else "on out-of-domain prompts"
    metric = f"{in_sentence(results.metrics[task.headline])} " if role == "in_domain" else ""
    found = difference(comparison, results.challenger, other, role, task.headline)
    first, second = _both(comparison, other, role)
    if found is None or first is None or second is None:
        return _unmeasured(comparison, role, where)
    gain = found if comparison.sign > 0 else found.reversed()
    phrases: dict[Judgement, str] = {
        "better": "better",
        "not worse": f"not worse (by the margin of {task.margin:g})",
        "slightly worse": f"worse, but by less than the margin of {task.margin:g}",
        "worse": "worse",
        "not clear": "not clearly different",
        "no interval": "too few prompts to judge",
    }
    if role == "out_of_domain":
        phrases["not clear"] = f"a loss of more than {task.margin:g} cannot be ruled out"
    judged = phrases[judge(gain, task.margin if role == "out_of_domain" else None)]
    bounds = "; ".join([format_number(found.mean, signed=True), *_intervals(found)])
    return f"{judged} {where}, {metric}{format_number(first.mean)} against {format_number(second.mean)} ({bounds})"


def _intervals(found: Estimate) -> list[str]:
    """The intervals that an estimate has, each with what it is for."""
    return [
        f"95 % interval {format_interval(interval, signed=True)} {about}"
        for interval, about in ((found.prompts, "for new prompts"), (found.runs, "for a new run"))
        if interval is not None
    ]


def _both(comparison: Comparison, other: str, role: Role) -> tuple[Estimate | None, Estimate | None]:
    """The headline of the challenger and of another entry over the seeds of their difference."""
    ours, theirs = comparison.finished(comparison.results.challenger), comparison.finished(other)
    if other != BASE:
        seeds = shared_seeds(comparison, comparison.results.challenger, other)
        ours, theirs = ({seed: places[seed] for seed in seeds} for places in (ours, theirs))
    metric = comparison.results.task.headline
    return tuple(value_at(comparison, list(places.values()), role, metric) for places in (ours, theirs))  # type: ignore[return-value]


def _unmeasured(comparison: Comparison, role: Role, where: str) -> str:
    """Why there is no number of the headline for a role."""
    results, sets = comparison.results, comparison.sets_of(role)
    if not sets:
        return f"there are no {'test' if role == 'in_domain' else 'out-of-domain'} prompts"
    others = [
        metric.label
        for name, metric in results.metrics.items()
        if metric.relation in ("untrained", "same data")
        and name != results.task.headline
        and value(comparison, results.challenger, role, name) is not None
    ]
    told = f", which {', '.join(others)} judge; the tables have them" if others else ""
    return f"{in_sentence(results.metrics[results.task.headline])} was not measured {where}{told}"


def speed_sentence(comparison: Comparison, baseline: str) -> str:
    """How soon the challenger reached the highest threshold that a ratio is known for; empty without thresholds."""
    axes = axes_of(comparison)
    if (
        not axes
        or not comparison.results.task.thresholds
        or not shared_seeds(comparison, comparison.results.challenger, baseline)
    ):
        return ""
    found, ours = speed(comparison, baseline, axes[0]), comparison.label(comparison.results.challenger)
    theirs = comparison.label(baseline)
    if not found.defined:
        gains = [
            f"{comparison.label(entry)} {format_number(gain.mean, signed=True)} ({format_bounds(gain, signed=True)})"
            for entry, gain in (
                (comparison.results.challenger, found.challenger_gain),
                (baseline, found.baseline_gain),
            )
            if gain is not None
        ]
        return (
            f"How much sooner {ours} is than {theirs} is undefined, because {theirs} has no sure gain over the "
            f"untrained base at its best guidance. The gains: {'; '.join(gains)}."
        )
    known = [each for each in found.thresholds if each.ratio is not None]
    if not known:
        return (
            f"Between {ours} and {theirs} no threshold has a speed ratio: the base is there, neither held it, or the "
            "evaluations are too far apart to tell."
        )
    each = known[-1]
    assert each.ratio is not None
    there = " The untrained base at its best guidance is there without training." if each.base_there else ""
    return (
        f"To reach {format_number(each.threshold)}, {theirs} needs {format_between(each.ratio.low, each.ratio.high)} "
        f"what {ours} needs, in {AXES[axes[0]]} ({count(len(each.challenger), 'seed')}).{there}"
    )


def cautions(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the headline."""
    results, found = comparison.results, []
    if results.base_guidance is None:
        found.append(
            "The base's best guidance was not chosen on validation prompts: it is shown at the curves' guidance."
        )
    if sentence := hindsight(comparison):
        found.append(sentence)
    for role in ROLES:
        where = "in domain" if role == "in_domain" else "out of domain"
        sets = comparison.sets_of(role)
        least = results.task.prompts_per_tag
        few = [name for name in sets if comparison.counted(name).all() and _largest_tag(comparison, name) < least]
        if few:
            found.append(
                f"No kind of prompt {where} has the {least} prompts that the headline asks for, so all of "
                f"{', '.join(few)} count."
            )
        if small := small_tags(comparison, role):
            named = ", ".join(tag or "(none)" for tag in small)
            found.append(f"Shown, but not in the headline {where}, for fewer than {least} prompts: {named}.")
    for name, metric in results.metrics.items():
        if metric.missing or not comparison.measured(name):
            found.append(f"{metric.label} is missing: {metric.missing or 'no picture carries it'}.")
    found += [
        f"{comparison.label(cell.entry)}, seed {cell.seed}, failed: {cell.reason or 'no reason was kept'}."
        for cell in results.cells
        if cell.status == "failed"
    ]
    found += [
        f"Alarm for reward hacking on validation prompts, {comparison.label(cell.entry)}, seed {cell.seed}, {alarm}."
        for cell in results.cells
        for alarm in cell.alarms
    ]
    return found


def hindsight(comparison: Comparison) -> str:
    """Another guidance that the test prompts would have had for the base, and what the gain is over that; else nothing.

    Chosen on the very prompts it is flattered; but a gain that it takes away came from the choice, not from training.
    """
    results = comparison.results
    headline, chosen = results.task.headline, results.base_guidance
    ours = comparison.finished(results.challenger) if results.challenger in results.entries else {}
    found = {
        guidance: value_at(comparison, [(BASE, NO_SEED, 0, guidance)], "in_domain", headline)
        for guidance in results.sampling.guidances
    }
    means = {guidance: each.mean for guidance, each in found.items() if each is not None}
    if chosen not in means or not ours:
        return ""
    best = max(means, key=lambda guidance: comparison.sign * means[guidance])
    left = gain_over_base(comparison, list(ours.values()), best, "in_domain", headline)
    if means[best] == means[chosen] or left is None:
        return ""
    bounds = f" ({intervals})" if (intervals := "; ".join(_intervals(left))) else ""
    return (
        f"On the test prompts themselves the base is better at guidance {best:g} than at {chosen:g}, which validation "
        f"prompts chose: {format_number(means[best])} against {format_number(means[chosen])}; over that "
        f"{comparison.label(results.challenger)} has {format_number(left.mean, signed=True)}{bounds}."
    )


def _largest_tag(comparison: Comparison, set_name: str) -> int:
    tags = [prompt.tag for prompt in comparison.results.sets[set_name].prompts]
    return max(tags.count(tag) for tag in set(tags))


def in_sentence(metric: MetricRecord) -> str:
    """A metric's label in the middle of a sentence: without its capital, unless it is an abbreviation."""
    label = metric.label
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]
