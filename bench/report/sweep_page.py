"""The page of a sweep: for each axis what was found, tables, curves and pictures; the style is the report's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dgpo_plugin.common.files import write_text_atomically

from ..pictures import PICTURES_FILE
from ..records import passes
from ..sweep_records import SWEEP_FILE, Axis, Setting
from .comparison import Role
from .drawing import Labels, paths_figure
from .drawing import Path as Line
from .figures import metric_name
from .gallery import data_uri
from .intervals import RESAMPLES, Estimate
from .numbers import format_interval, format_number
from .page import environment
from .sweep_values import AXES, SweepView, best_of, read_sweep_view
from .table import Column, Row, Table, TableCell, latex, markdown
from .tables import ROLES, columns_for, difference_cell, value_cell
from .verdict import judge

PAGE = "sweep.html"
COLORS = ("#D55E00",)
UNITS: dict[Axis, str] = {"strength": "strength", "steps": "steps of the sampler", "guidance": "guidance"}


@dataclass(frozen=True)
class Strip:
    """The grid's prompts at one setting, as a data URI."""

    title: str
    uri: str


def write_sweep_report(folder: Path) -> Path:
    """Draw ``sweep.html``, ``tables.md`` and ``tables.tex`` of a folder that a sweep wrote.

    They are functions of ``sweep.json``, ``pictures.csv.gz`` and the grids' PNG files. Nothing is written before all is
    made.

    Raises:
        UserError: the results cannot be read or drawn, or the folder cannot be written to.
    """
    view = read_sweep_view(folder)
    page = environment().get_template("sweep.html.j2").render(**_values(view, folder))
    tables = [table for axis in AXES for table in axis_tables(view, axis)]
    for name, text in {"tables.md": markdown(tables), "tables.tex": latex(tables), PAGE: page}.items():
        write_text_atomically(folder / name, text)
    return folder / PAGE


def sweep_conclusions(folder: Path) -> list[str]:
    """The sentences at the top of a sweep's page.

    Raises:
        UserError: the folder's results cannot be read.
    """
    view = read_sweep_view(folder)
    return [verdict(view), *(axis_sentence(view, axis) for axis in _walked(view)), *view.record.cautions]


def verdict(view: SweepView) -> str:
    """The adapter where the axes cross against the untrained base at its best guidance."""
    record, center = view.record, view.record.center
    parts = []
    for role, where in (("in_domain", "in domain"), ("out_of_domain", "on out-of-domain prompts")):
        parts += _against(view, center, view.rival, role, where)  # type: ignore[arg-type]  # both are roles
    metric = record.metrics[record.task.headline].label
    return (
        f"{record.adapter} at {_described(center)}, against the untrained base at its best guidance "
        f"({record.base_guidance:g}), {metric}: {'; '.join(parts) or 'not measured'}."
    )


def axis_sentence(view: SweepView, axis: Axis) -> str:
    """Which value of an axis has the best headline, whether that is sure, and where out-of-domain prompts pay."""
    record, settings = view.record, view.on_axis(axis)
    tried = [record.center.base(), *settings] if axis == "strength" else settings
    best, center, metric = best_of(view, tried), record.center, record.metrics[record.task.headline].label
    sentence = f"{AXES[axis]}: {metric} in domain is best at {_plain(axis, best) if best.strength else '0, the base'}"
    found = view.value(best, "in_domain", record.task.headline)
    sentence += f" ({format_number(found.mean)})" if found is not None else ""
    gain = view.gain(best, center, "in_domain")
    if best != center and gain is not None:
        sure = {"better": "surely better than", "no interval": "of too few prompts to judge against"}
        word = sure.get(judge(gain), "not clearly better than")
        sentence += f", {word} {_plain(axis, center)} ({_signed(view, best, center, 'in_domain')})"
    else:
        unsure = [
            _plain(axis, each)
            for each in tried
            if each != best and (gained := view.gain(best, each, "in_domain")) is not None and judge(gained) != "better"
        ]
        sentence += f"; not clearly better than {', '.join(unsure)}" if unsure else ""
    worse = [
        _plain(axis, each)
        for each in settings
        if (lost := view.gain(each, each.base(), "out_of_domain")) is not None and judge(lost) == "worse"
    ]
    sentence += f". On out-of-domain prompts worse than the base at {', '.join(worse)}" if worse else ""
    return f"{sentence}."


def axis_tables(view: SweepView, axis: Axis) -> list[Table]:
    """What the settings of an axis scored, the base beside them; and the differences from it, picture by picture."""
    record, settings = view.record, view.on_axis(axis)
    if len(record.axes[axis]) < 2 and axis != "strength":
        return []
    everything = [each for one in settings for each in (one.base(), one)]
    columns = columns_for(
        record.metrics,
        record.task.headline,
        lambda role, name: any(view.value(each, role, name) is not None for each in everything),
    )
    heads = [column for _, _, column in columns]
    values = [
        Row(
            _row_label(axis, each),
            [value_cell(view.value(each, role, name), strong=each == record.center) for name, role, _ in columns],
            f"{passes(each.steps, each.guidance)} evaluations a picture",
            "entry-0" if each.strength else "entry-base",
        )
        for each in dict.fromkeys(everything)
    ]
    rivals: list[tuple[Role, Column]] = [
        (role, Column(group, f"Less the base at its best guidance ({record.base_guidance:g})"))
        for role, group in ROLES.items()
        if view.value(view.rival, role, record.task.headline) is not None
    ]
    gains = [
        Row(
            _row_label(axis, each),
            [*_rival_cells(view, each, rivals), *_gain_cells(view, each, columns)],
            "",
            "entry-0",
        )
        for each in settings
    ]
    about = "Under a value: its 95 % interval for this adapter and new prompts. In bold: where the axes cross."
    return [
        Table(f"{AXES[axis]}: what was measured", AXES[axis], heads, values, about=about),
        Table(
            f"{AXES[axis]}: less the base at the same steps and guidance",
            AXES[axis],
            [*(column for _, column in rivals), *heads],
            gains,
            about="Differences of pictures of the same prompt and noise. Under a value: its 95 % interval for new "
            "prompts, and what it shows.",
        ),
    ]


def axis_figures(view: SweepView, axis: Axis) -> list[str]:
    """Every metric against the values of an axis, adapter and base: the headline on both kinds of prompts first."""
    record, settings = view.record, view.on_axis(axis)
    headline = record.task.headline
    wanted: list[tuple[Role, str]] = [("in_domain", headline), ("out_of_domain", headline)]
    for name in record.metrics:
        inside = view.value(record.center, "in_domain", name) is not None
        if name != headline:
            wanted.append(("in_domain" if inside else "out_of_domain", name))
    found = []
    for role, name in wanted:
        lines = [
            _line(view, axis, settings, role, name, base=False),
            _line(view, axis, settings, role, name, base=True),
        ]
        if axis == "strength":  # where the base is one point, strength 0
            lines = [_line(view, axis, [record.center.base(), *settings], role, name, base=False)]
        level, metric = view.value(view.rival, role, name), record.metrics[name]
        if all(len(line.x) > 1 for line in lines):
            labels = Labels(
                f"{metric.label}, {ROLES[role].lower()}, against {UNITS[axis]}",
                UNITS[axis],
                f"{ROLES[role]}: {metric_name(metric)}",
                counts=False,
            )
            found.append(paths_figure(labels, lines, None if level is None else level.mean, "Base, best guidance"))
    return found


def grid(view: SweepView, axis: Axis, folder: Path) -> list[Strip]:
    """The same prompts from the same noise along an axis, the base first or beside.

    Raises:
        UserError: a picture is missing, no PNG, or lies outside the folder.
    """
    settings = view.on_axis(axis)
    shown = list(dict.fromkeys(each for one in settings for each in (one.base(), one)))
    files = view.record.galleries
    return [Strip(_row_label(axis, each), data_uri(folder, files[each.name])) for each in shown if each.name in files]


def _values(view: SweepView, folder: Path) -> dict[str, Any]:
    """What the template fills in, by the names it has there."""
    record = view.record
    sections = [
        {
            "title": AXES[axis],
            "sentence": axis_sentence(view, axis),
            "fixed": _fixed(axis, record.center),
            "tables": axis_tables(view, axis),
            "figures": [Markup(figure) for figure in axis_figures(view, axis)],  # noqa: S704 (drawing escapes labels)
            "strips": grid(view, axis, folder),
        }
        for axis in _walked(view)
    ]
    return {
        "record": record,
        "colors": COLORS,
        "verdict": verdict(view),
        "sections": sections,
        "axes": {AXES[axis]: ", ".join(f"{value:g}" for value in values) for axis, values in record.axes.items()},
        "center": _described(record.center),
        "resamples": RESAMPLES,
        "folder": folder.name or "FOLDER",
        "sweep_file": SWEEP_FILE,
        "pictures_file": PICTURES_FILE,
    }


def _walked(view: SweepView) -> list[Axis]:
    """The axes with something to compare: of strengths, one and the base are enough."""
    return [axis for axis in AXES if len(view.on_axis(axis)) > (0 if axis == "strength" else 1)]


def _line(view: SweepView, axis: Axis, settings: list[Setting], role: Role, metric: str, *, base: bool) -> Line:
    """The adapter's curve along an axis, or the base's."""
    found: list[tuple[float, Estimate]] = []
    for setting in settings:
        value = view.value(setting.base() if base else setting, role, metric)
        if value is not None:
            found.append((setting.on(axis), value))
    bounds = [(e.prompts.low, e.prompts.high) if e.prompts is not None else (np.nan, np.nan) for _, e in found]
    return Line(
        "Base, same guidance" if base else "Adapter",
        -1 if base else 0,
        np.array([x for x, _ in found]),
        np.array([each.mean for _, each in found]),
        strong=not base,
        intervals=np.array(bounds, dtype=np.float64).reshape(len(found), 2),
    )


def _gain_cells(view: SweepView, setting: Setting, columns: list[tuple[str, Role, Column]]) -> list[TableCell]:
    record = view.record
    return [
        difference_cell(record.metrics, record.task, view.difference(setting, setting.base(), role, name), name, role)
        for name, role, _ in columns
    ]


def _rival_cells(view: SweepView, setting: Setting, rivals: list[tuple[Role, Column]]) -> list[TableCell]:
    record, name = view.record, view.record.task.headline
    return [
        difference_cell(record.metrics, record.task, view.difference(setting, view.rival, role, name), name, role)
        for role, _ in rivals
    ]


def _against(view: SweepView, setting: Setting, other: Setting, role: Role, where: str) -> list[str]:
    """One setting against another on the prompts of one role, and what that shows; nothing where it has none."""
    name, task = view.record.task.headline, view.record.task
    values, gain = (view.value(setting, role, name), view.value(other, role, name)), view.gain(setting, other, role)
    if values[0] is None or values[1] is None or gain is None:
        return []
    judged = judge(gain, task.margin if role == "out_of_domain" else None)
    both = f"{format_number(values[0].mean)} against {format_number(values[1].mean)}"
    return [f"{judged} {where}, {both} ({_signed(view, setting, other, role)})"]


def _signed(view: SweepView, setting: Setting, other: Setting, role: Role) -> str:
    """A difference of the headline with its interval."""
    found = view.difference(setting, other, role, view.record.task.headline)
    assert found is not None
    interval = format_interval(found.prompts, signed=True)
    return format_number(found.mean, signed=True) + (f", 95 % interval {interval} for new prompts" if interval else "")


def _described(setting: Setting) -> str:
    return f"strength {setting.strength:g}, {setting.steps} steps, guidance {setting.guidance:g}"


def _fixed(axis: Axis, center: Setting) -> str:
    """What the other axes stand at."""
    texts = {"strength": f"strength {center.strength:g}", "steps": f"{center.steps} steps"}
    texts["guidance"] = f"guidance {center.guidance:g}"
    return " and ".join(text for other, text in texts.items() if other != axis)


def _plain(axis: Axis, setting: Setting) -> str:
    return f"{setting.on(axis):g}"


def _row_label(axis: Axis, setting: Setting) -> str:
    """What a setting is called in its axis' table."""
    if axis == "strength":
        return _plain(axis, setting) if setting.strength else "0, the base"
    unit = "" if axis == "guidance" else " steps"
    return f"{_plain(axis, setting)}{unit}{'' if setting.strength else ', base'}"
