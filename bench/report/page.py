"""A results folder to one self-contained HTML file: no script, no request, readable in ten years."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically

from ..pictures import PICTURES_FILE
from ..records import Results
from .comparison import Comparison, missing_cells, read_comparison
from .cost_tables import cost_table, settings_table, speed_tables, tuning_table
from .figures import FigureGroup, figure_groups
from .gallery import gallery
from .intervals import LEAST_SEEDS, RESAMPLES
from .measures import curve_values
from .needs import needs_sentence
from .speed import AXES
from .table import Table, latex, markdown
from .tables import ROLES, best_of_table, ends_table, gains_table, guidance_table, pairs_table, tags_table
from .verdict import cautions, headline, rivals

_HERE = Path(__file__).parent
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
"""Okabe and Ito's palette and two more, told apart with any color vision; in turn for who has no color of its own."""


def write_report(folder: Path) -> Path:
    """Draw ``report.html``, ``curves.csv``, ``tables.md`` and ``tables.tex`` of a folder that a comparison wrote.

    They are functions of ``results.json``, ``pictures.csv.gz`` and the gallery's PNG files: the same give the same
    bytes. Nothing is written before all is made.

    Raises:
        UserError: the results cannot be read or drawn, or the folder cannot be written to.
    """
    comparison = read_comparison(folder)
    page = render_report(comparison, folder)
    tables = [table for _, group in table_groups(comparison) for table in group]
    files = {"curves.csv": curves_csv(comparison), "tables.md": markdown(tables), "tables.tex": latex(tables)}
    files["report.html"] = page
    for name, text in files.items():
        write_text_atomically(folder / name, text)
    return folder / "report.html"


def render_report(comparison: Comparison, folder: Path) -> str:
    """The whole page.

    Raises:
        UserError: a gallery picture in ``folder`` is missing or no PNG, or an entry's color is none.
    """
    return environment().get_template("page.html.j2").render(**_values(comparison, folder))


def environment() -> jinja2.Environment:
    """The templates of the pages, everything in them escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def table_groups(comparison: Comparison) -> list[tuple[str, list[Table]]]:
    """The tables of a report, as (title, tables), in the order of the page."""
    tuning, roles = tuning_table(comparison), [role for role in ROLES if comparison.sets_of(role)]
    groups = [
        ("Results", [ends_table(comparison), gains_table(comparison), pairs_table(comparison)]),
        (
            "Against the base at every guidance",
            [guidance_table(comparison, role) for role in roles],
        ),
        ("How soon", speed_tables(comparison)),
        ("By kind of prompt", [tags_table(comparison, role) for role in roles]),
        ("Best of N", [best_of_table(comparison)]),
        ("Cost", [cost_table(comparison)]),
        ("Tuning", [] if tuning is None else [tuning]),
    ]
    return [(title, tables) for title, tables in groups if tables]


def curves_csv(comparison: Comparison) -> str:
    """Every checkpoint as a CSV row: entry, seed, iteration, all costs, a column for each metric and role."""
    results, buffer = comparison.results, io.StringIO()
    columns = [(role, metric) for role in ROLES for metric in results.metrics]
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [f"{metric} {role}" for role, metric in columns]
    writer.writerow(["entry", "seed", "checkpoint", "iteration", *AXES, "drift", *heads])
    for cell in results.cells:
        curves = [dict(zip(*curve_values(comparison, cell, role, metric), strict=True)) for role, metric in columns]
        for index, point in enumerate(cell.checkpoints):
            costs = [getattr(point, axis) for axis in AXES]
            values = [float(curve[index]) if index in curve else None for curve in curves]
            row = [cell.entry, cell.seed, index, point.iteration, *costs, point.drift, *values]
            writer.writerow(["" if each is None else each for each in row])
    return buffer.getvalue()


def entry_colors(results: Results) -> list[str]:
    """One hex color for each entry, in order: its own, else the next of the palette that is free.

    Raises:
        UserError: a color is not #RRGGBB.
    """
    given = [entry.color for entry in results.entries.values()]
    for name, color in zip(results.entries, given, strict=True):
        if color and not re.fullmatch(r"#[0-9A-Fa-f]{6}", color):
            raise UserError(f"results: entry {name}: color {color!r} is not #RRGGBB")
    taken = {color.upper() for color in given}
    free = itertools.cycle([color for color in _COLORS if color not in taken] or _COLORS)
    return [color or next(free) for color in given]


def interval_note(comparison: Comparison) -> str:
    """What the intervals are, and how far to trust them with as many seeds as there are."""
    counts = [len(comparison.finished(entry)) for entry in comparison.results.entries]
    seeds = min((number for number in counts if number), default=0)
    note = (
        "Differences are taken between pictures of the same prompt and the same noise. There are two intervals, both "
        "95 %. These adapters, new prompts: how far the number could move if other prompts of the same kinds were "
        f"drawn for the very adapters trained here (prompts resampled inside their kinds, {RESAMPLES:,} times). A new "
        "run: where the mean would lie if everything were trained again with other seeds, on the same prompts "
        "(Student's t over seeds)."
    )
    if seeds < LEAST_SEEDS:
        note += (
            f" Here the fewest seeds of a method are {seeds}: below {LEAST_SEEDS} there is no interval of a new run, "
            "only the points, and nothing here says how a method does rather than these adapters."
        )
    return note


def _values(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What the template fills in, by the names it has there."""
    results = comparison.results
    pictures, colors = gallery(results, folder), entry_colors(results)
    names = {entry: comparison.label(entry) for entry in results.entries}
    figures = {group.title: _inline(group) for group in figure_groups(comparison)}
    return {
        "results": results,
        "title": f"{results.metrics[results.task.headline].label}: {', '.join(names.values())}",
        "headline": headline(comparison),
        "rivals": rivals(comparison),
        "cautions": cautions(comparison),
        "missing": [f"{names[entry]} seed {seed}" for entry, seed in missing_cells(results)],
        "colors": colors,
        "tables": dict(table_groups(comparison)),
        "figures": figures,
        "metrics": results.metrics,
        "interval_note": interval_note(comparison),
        "needs": needs_sentence(comparison),
        "gallery": pictures,
        "settings_table": settings_table(comparison),
        "settings": {names[entry]: _yaml(record.settings) for entry, record in results.entries.items()},
        "published": yaml.safe_load((_HERE / "published.yaml").read_text(encoding="utf-8")),
        "budget": f"size {results.budget.size}, {results.budget} of training a run",
        "folder": folder.name or "FOLDER",
        "pictures_file": PICTURES_FILE,
    }


def _inline(group: FigureGroup) -> dict[str, Any]:
    """A group whose figures are of our own, the one thing not escaped again: drawing.py escapes every label inside."""
    return {"about": group.about, "figures": [Markup(figure) for figure in group.figures]}  # noqa: S704


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=110)
