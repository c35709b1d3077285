"""The tables of what was scored: where everyone ended, differences, guidances, kinds of prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..records import BASE, MetricRecord, TaskRecord, passes
from .comparison import Comparison, Place, Role, small_tags
from .intervals import Estimate
from .measures import best_of, difference, gain_at, value, value_at
from .numbers import NONE, format_guidances, format_interval, format_number
from .table import Column, Row, Table, TableCell
from .verdict import judge

BETTER = {"higher": "↑ higher is better", "lower": "↓ lower is better", "none": "= as the base is best"}
ROLES: dict[Role, str] = {"in_domain": "In domain", "out_of_domain": "Out-of-domain prompts"}


def columns_of(comparison: Comparison) -> list[tuple[str, Role, Column]]:
    """Which metrics stand in the table of ends, and where."""
    results = comparison.results
    return columns_for(results.metrics, results.task.headline, lambda role, name: _measured(comparison, role, name))


def columns_for(
    metrics: Mapping[str, MetricRecord], headline: str, measured: Callable[[Role, str], bool]
) -> list[tuple[str, Role, Column]]:
    """Which metrics a table has, and where: (metric, role, column), grouped by what they can show.

    "Out of domain" means two things that are never one claim: other prompts, and metrics that were not trained on.

    Args:
        measured: whether a metric was measured on a role's prompts.
    """
    groups: dict[str, str] = {
        "untrained": "Metrics not trained on",
        "same data": "Metrics that learnt from the same data",
        "statistic": "Statistics of pictures",
    }
    found: list[tuple[str, Role, Column]] = []
    names = [headline, *(name for name in metrics if name != headline)]
    for role, group in ROLES.items():
        for name in names:
            metric = metrics[name]
            if (metric.relation == "trained" or name == headline) and measured(role, name):
                found.append((name, role, Column(metric.label, group, _note(metric))))
    for relation, group in groups.items():
        for name in names:
            metric = metrics[name]
            if metric.relation != relation or name == headline:
                continue
            for role in ROLES:
                if measured(role, name) and not (relation == "statistic" and role == "out_of_domain"):
                    column = Column(metric.label, group, f"{ROLES[role].lower()}; {_note(metric)}")
                    found.append((name, role, column))
    return found


def ends_table(comparison: Comparison) -> Table:
    """Where everyone ended, each at its own guidance, with the interval of other prompts and each seed's point."""
    columns = columns_of(comparison)
    rows = []
    for entry in [BASE, *comparison.results.entries]:
        cells = [value_cell(value(comparison, entry, role, metric)) for metric, role, _ in columns]
        rows.append(Row(comparison.label(entry), cells, _row_note(comparison, entry), color_of(comparison, entry)))
        if best := list(comparison.best(entry).values()):
            cells = [value_cell(value_at(comparison, best, role, metric)) for metric, role, _ in columns]
            rows.append(_best_row(comparison, entry, cells))
    return Table(
        "Where everyone ended",
        "Method",
        [column for _, _, column in columns],
        rows,
        about="Each at its own guidance, chosen on validation prompts. Under a value: its 95 % interval for these "
        f"adapters and new prompts, then each seed.{about_best(comparison)}",
    )


def best_label(comparison: Comparison, entry: str) -> str:
    """What an entry's best checkpoints are called."""
    return f"{comparison.label(entry)}, best on validation"


def about_best(comparison: Comparison) -> str:
    """What the rows of best checkpoints are, for the end of a paragraph; empty where there is none."""
    if not any(comparison.best(entry) for entry in comparison.results.entries):
        return ""
    guidance = comparison.results.sampling.guidance
    return (
        " Best on validation: of each cell the checkpoint with the highest headline on validation prompts at guidance "
        f"{guidance:g}, the earliest of equal ones; no test prompt had a say. The other row of a method is its end."
    )


def _best_row(comparison: Comparison, entry: str, cells: list[TableCell]) -> Row:
    """A row of an entry's best checkpoints: where each was taken, and at which guidance it is shown."""
    places, cells_of = comparison.best(entry), comparison.results.cells_of(entry)
    taken = [cells_of[seed].checkpoints[place[2]].denoiser_evaluations for seed, place in places.items()]
    after = f"{', '.join(f'{each:,}' for each in taken)} denoiser evaluations"
    note = f"guidance {format_guidances(place[3] for place in places.values())}; taken after {after}"
    return Row(best_label(comparison, entry), cells, note, color_of(comparison, entry))


def gains_table(comparison: Comparison) -> Table:
    """Every entry less the untrained base, each at its best guidance, picture by picture."""
    results, columns = comparison.results, columns_of(comparison)

    def cells(found: Iterable[Estimate | None]) -> list[TableCell]:
        return [
            difference_cell(results.metrics, results.task, each, metric, role)
            for each, (metric, role, _) in zip(found, columns, strict=True)
        ]

    rows = []
    for entry in results.entries:
        at_end = cells(difference(comparison, entry, BASE, role, metric) for metric, role, _ in columns)
        rows.append(Row(comparison.label(entry), at_end, _row_note(comparison, entry), color_of(comparison, entry)))
        if best := list(comparison.best(entry).values()):
            at_best = cells(gain_at(comparison, best, role, metric) for metric, role, _ in columns)
            rows.append(_best_row(comparison, entry, at_best))
    return Table(
        "Gain over the untrained base at its best guidance",
        "Method",
        [column for _, _, column in columns],
        rows,
        about="Differences of pictures of the same prompt and noise. Under a value: the 95 % interval for new prompts, "
        "then that of a new run where there are five seeds, and what it shows.",
    )


def pairs_table(comparison: Comparison) -> Table:
    """The challenger less every other entry, in and out of domain."""
    results = comparison.results
    headline = results.task.headline
    columns = [
        Column(label, group, note)
        for group in ROLES.values()
        for label, note in (
            ("Difference", _note(results.metrics[headline])),
            ("These adapters, new prompts", "95 % interval"),
            ("A new run", "95 % interval"),
            ("Seeds", "difference of each"),
        )
    ]
    rows = []
    for other in [BASE, *(entry for entry in results.entries if entry != results.challenger)]:
        cells: list[TableCell] = []
        for role in ROLES:
            found = difference(comparison, results.challenger, other, role, headline)
            cells += _pair_cells(comparison, found, role)
        rows.append(Row(f"less {comparison.label(other)}", cells, "", color_of(comparison, other)))
    name = results.entries[results.challenger].label if results.challenger in results.entries else results.challenger
    return Table(f"{name} less the others", name, columns, rows)


def guidance_table(comparison: Comparison, role: Role) -> Table:
    """The headline of base and finished adapters at every guidance, each one's own in bold."""
    results = comparison.results
    sampling = results.sampling
    columns = [
        Column(f"{guidance:g}", "Guidance", f"{passes(sampling.steps, guidance)} evaluations a picture")
        for guidance in sampling.guidances
    ]
    rows = []
    for entry in [BASE, *results.entries]:
        places = comparison.finished(entry).values()
        chosen = {place[3] for place in places}
        cells = []
        for guidance in sampling.guidances:
            moved = [(*place[:3], guidance) for place in places]
            found = value_at(comparison, moved, role, results.task.headline)
            cells.append(value_cell(found, strong=guidance in chosen))
        rows.append(Row(comparison.label(entry), cells, "", color_of(comparison, entry)))
    return Table(
        f"{results.metrics[results.task.headline].label} at every guidance, {ROLES[role].lower()}",
        "Method",
        columns,
        rows,
        about=f"In bold: the guidance chosen on validation prompts{_chosen_on(comparison)}. An evaluation is one "
        "picture through the denoiser once; guidance above 1 takes two for a step, unless the model has it distilled "
        "in.",
    )


def _chosen_on(comparison: Comparison) -> str:
    """On how many pictures the base's guidance was chosen, and a cell's."""
    base, cell = chosen_on(comparison, [BASE]), chosen_on(comparison, list(comparison.results.entries))
    return f", the base's on {base:,} pictures at each, a cell's on {cell:,}" if base and cell else ""


def chosen_on(comparison: Comparison, entries: Sequence[str]) -> int:
    """On how many validation pictures at each the guidance of some entries' last checkpoints was chosen."""
    sets = comparison.sets_of("validation")
    places = [place for entry in entries for place in comparison.finished(entry).values()]
    return max((_drawn(comparison, place, sets) for place in places), default=0)


def _drawn(comparison: Comparison, place: Place, sets: Sequence[str]) -> int:
    """How many pictures of some sets there are of a place."""
    entry, seed, checkpoint, guidance = place
    return sum(len(comparison.groups.get((entry, seed, name, checkpoint, guidance), ())) for name in sets)


def tags_table(comparison: Comparison, role: Role) -> Table:
    """The headline by kind of prompt."""
    results = comparison.results
    counts: dict[str, int] = {}
    for name in comparison.sets_of(role):
        for prompt in results.sets[name].prompts:
            counts[prompt.tag] = counts.get(prompt.tag, 0) + 1
    small, entries = small_tags(comparison, role), [BASE, *results.entries]
    rows = []
    for tag, prompts in counts.items():
        cells = [value_cell(value(comparison, entry, role, results.task.headline, tag)) for entry in entries]
        note = f"{prompts} prompts" + (", not in the headline" if tag in small else "")
        rows.append(Row(tag or "(no kind)", cells, note))
    columns = [Column(comparison.label(entry)) for entry in entries]
    headline = results.metrics[results.task.headline].label
    return Table(f"{headline} by kind of prompt, {ROLES[role].lower()}", "Kind of prompt", columns, rows)


def best_of_table(comparison: Comparison) -> Table:
    """The headline in domain if the best of N pictures is kept, which costs N times as much to sample."""
    results = comparison.results
    entries = [BASE, *results.entries]
    numbers = (1, 2, 4, 8, 16, 32, 64)
    counts = [n for n in numbers if n == 1 or any(best_of(comparison, entry, n) is not None for entry in entries)]
    rows = []
    for entry in entries:
        found = [best_of(comparison, entry, number) for number in counts]
        guidances = {place[3] for place in comparison.finished(entry).values()}
        cost = ", ".join(f"{passes(results.sampling.steps, g)}" for g in sorted(guidances))
        cells = [TableCell(NONE if each is None else format_number(each)) for each in found]
        note = f"{cost} evaluations a picture" if cost else ""
        rows.append(Row(comparison.label(entry), cells, note, color_of(comparison, entry)))
    return Table(
        "Best of N pictures",
        "Method",
        [Column(str(number), "N, pictures sampled for each one kept") for number in counts],
        rows,
        about="What sampling more and keeping the best gives without training, or on top of it: the expected maximum "
        "of N of a prompt's pictures, chosen by the headline metric itself, so the most that choosing can give. "
        "Compare at equal cost: N times the evaluations of a picture.",
    )


def color_of(comparison: Comparison, entry: str) -> str:
    """The name of an entry's color in the page's style."""
    return "entry-base" if entry == BASE else f"entry-{list(comparison.results.entries).index(entry)}"


def _measured(comparison: Comparison, role: Role, metric: str) -> bool:
    entries: Iterable[str] = [BASE, *comparison.results.entries]
    return any(value(comparison, entry, role, metric) is not None for entry in entries)


def _note(metric: MetricRecord) -> str:
    arrow = BETTER[metric.better]
    later = "; added later" if metric.added else ""
    return f"{arrow}; {'trained on' if metric.relation == 'trained' else metric.relation}{later}"


def _row_note(comparison: Comparison, entry: str) -> str:
    places = comparison.finished(entry).values()
    guidance = f"guidance {format_guidances(place[3] for place in places)}" if places else "no finished run"
    control = entry != BASE and comparison.results.entries[entry].kind == "control"
    return f"control; {guidance}" if control else guidance


def _points(estimate: Estimate, signed: bool = False) -> str:
    if len(estimate.points) < 2:
        return ""
    return "seeds " + " ".join(format_number(point, signed) for point in estimate.points)


def value_cell(found: Estimate | None, strong: bool = False) -> TableCell:
    """A value, under it its interval and its seeds."""
    if found is None:
        return TableCell(NONE, "not measured")
    notes = [format_interval(found.prompts), _points(found)]
    return TableCell(format_number(found.mean), "; ".join(note for note in notes if note), strong)


def difference_cell(
    metrics: Mapping[str, MetricRecord], task: TaskRecord, found: Estimate | None, metric: str, role: Role
) -> TableCell:
    """A difference, under it its intervals and what they show."""
    if found is None:
        return TableCell(NONE, "not measured")
    runs = format_interval(found.runs, signed=True)
    notes = [format_interval(found.prompts, signed=True), f"a new run {runs}" if runs else ""]
    better = metrics[metric].better
    if better != "none":
        margin = task.margin if metric == task.headline and role == "out_of_domain" else None
        notes.append(judge(found.reversed() if better == "lower" else found, margin))
    return TableCell(format_number(found.mean, signed=True), "; ".join(note for note in notes if note))


def _pair_cells(comparison: Comparison, found: Estimate | None, role: Role) -> list[TableCell]:
    if found is None:
        return [TableCell(NONE, "nothing shared"), *([TableCell(NONE)] * 3)]
    margin = comparison.results.task.margin if role == "out_of_domain" else None
    judged = judge(found if comparison.sign > 0 else found.reversed(), margin)
    return [
        TableCell(format_number(found.mean, signed=True), judged),
        TableCell(format_interval(found.prompts, signed=True) or NONE),
        TableCell(format_interval(found.runs, signed=True) or NONE, "" if found.runs else "fewer than five seeds"),
        TableCell(" ".join(format_number(point, signed=True) for point in found.points)),
    ]
