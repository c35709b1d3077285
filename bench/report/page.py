"""``results.json`` to one self-contained HTML file: no script, no request, readable in ten years."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from markupsafe import Markup

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import read_bytes, write_text_atomically

from ..results import Results, read_results
from .curves import Axis, missing_runs, primary_metric, runs_of
from .figures import algorithm_colors, metric_figure, tradeoff_figure
from .guidance import base_sentence, guidances
from .intervals import RESAMPLES
from .tables import difference_title, differing_settings, guidance_tables, metric_rows, speed_rows
from .verdict import verdict

_HERE = Path(__file__).parent
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AXES: tuple[tuple[Axis, str], ...] = (("seconds", "training time"), ("denoiser_evaluations", "denoiser evaluations"))
_DOMAINS: tuple[tuple[Literal["in", "out"], str], ...] = (
    ("in", "In domain: what was optimized"),
    ("out", "Out of domain: what should not suffer"),
)


@dataclass(frozen=True)
class Picture:
    """One gallery picture as a data URI, with the name above it and the text for who cannot see it."""

    name: str
    uri: str
    alt: str


def write_report(folder: Path) -> Path:
    """Draw ``folder/report.html`` and ``curves.csv`` from ``folder/results.json`` and the gallery pictures beside it.

    Neither is written before both are made.

    Raises:
        UserError: the results cannot be read, a gallery picture is missing, or the folder cannot be written to.
    """
    path, results = folder / "report.html", read_results(folder / "results.json")
    page = render_report(results, folder)
    write_text_atomically(folder / "curves.csv", curves_csv(results))
    write_text_atomically(path, page)
    return path


def render_report(results: Results, folder: Path) -> str:
    """The whole page. The same results and pictures give the same text, byte for byte.

    Raises:
        UserError: the primary metric is unusable, or a gallery picture in ``folder`` is missing or no PNG.
    """
    primary_metric(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(**_values(results, folder))


def _values(results: Results, folder: Path) -> dict[str, Any]:
    """What the template fills in, by the names it has there."""
    budget = results.budget
    out_of_domain = [name for name, metric in results.metrics.items() if metric.domain == "out"]
    return {
        "results": results,
        "verdict": verdict(results),
        "against_base": base_sentence(results, results.challenger),
        "guidances": guidances(results),
        "guidance_tables": guidance_tables(results),
        "missing": [f"{results.label(algorithm)} seed {seed}" for algorithm, seed in missing_runs(results)],
        "primary": results.metrics[results.primary],
        "challenger": results.label(results.challenger),
        "names": {algorithm: results.label(algorithm) for algorithm in results.algorithms},
        "colors": algorithm_colors(results),
        "figures": [_inline(metric_figure(results, results.primary, axis, f"primary-{axis}")) for axis, _ in _AXES],
        "speeds": [(title, speed_rows(results, axis)) for axis, title in _AXES],
        "difference_title": difference_title(results),
        "domains": [(title, metric_rows(results, domain)) for domain, title in _DOMAINS],
        "tradeoffs": [_inline(tradeoff_figure(results, name, f"tradeoff-{i}")) for i, name in enumerate(out_of_domain)],
        "pictures": gallery(results, folder),
        "differing": differing_settings(results.settings),
        "settings": {results.label(name): _yaml(settings) for name, settings in results.settings.items()},
        "published": yaml.safe_load((_HERE / "published.yaml").read_text(encoding="utf-8")),
        "interval_note": interval_note(results),
        "budget": f"size {budget.size}, {budget.evaluations:,} denoiser evaluations of training per run",
        "folder": folder.name or "FOLDER",
    }


def curves_csv(results: Results) -> str:
    """Every evaluation as one CSV row: algorithm, seed, iteration, both costs, a column per metric (or empty)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["algorithm", "seed", "iteration", "seconds", "denoiser_evaluations", *results.metrics])
    for run in results.runs:
        for point in run.evaluations:
            values = [point.metrics.get(name, "") for name in results.metrics]
            cost = [point.iteration, point.seconds, point.denoiser_evaluations]
            writer.writerow([run.algorithm, run.seed, *cost, *values])
    return buffer.getvalue()


def _inline(svg: str) -> Markup:
    """A figure of our own, the one thing not escaped again: figures.py escapes every label inside it."""
    return Markup(svg)  # noqa: S704


def interval_note(results: Results) -> str:
    """What the intervals are, and how far to trust them with as many seeds as there are."""
    counts = [len(runs_of(results, algorithm)) for algorithm in results.algorithms]
    seeds = min((count for count in counts if count), default=0)
    what = f"Intervals are 95 % percentile bootstraps over seeds, {RESAMPLES:,} resamples."
    if seeds <= 1:
        return f"{what} One seed tells nothing about the spread between seeds, so what rests on one has no interval."
    if seeds <= 3:  # all draws alike has probability 3^-3 = 3.7 % > 2.5 %, so the percentiles are the extremes
        # The extremes of n draws miss a symmetric center only when all n fall on one side of it.
        cover = round(100 * (1 - 2 ** (1 - seeds)))
        return (
            f"{what} With only {seeds} seeds such an interval is simply the range from the lowest seed to the highest: "
            f"a rough guide, which holds the true mean about {cover} % of the time, not 95 %."
        )
    if seeds < 10:
        return f"{what} With only {seeds} seeds such an interval is a rough guide and tends to be too narrow."
    return what


def gallery(results: Results, folder: Path) -> list[Picture]:
    """The gallery's pictures as data URIs: the base first, then the algorithms in order, then any other.

    Raises:
        UserError: a file is missing, cannot be read, is not a PNG, or lies outside the folder (a page that is passed on
            must not carry some other picture of the disk).
    """
    known = ["base", *results.algorithms]
    order = [name for name in known if name in results.gallery] + [
        name for name in results.gallery if name not in known
    ]
    prompts = "; ".join(results.gallery_prompts)
    pictures = []
    for name in order:
        path = folder / results.gallery[name]
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except ValueError as error:  # a NUL character, or half of a character
            raise UserError(f"gallery picture {path}: no file can be called so; compare again") from error
        if not inside:
            raise UserError(f"gallery picture {path}: lies outside {folder}; run `dgpo-bench compare` again")
        try:
            data = read_bytes(path)
        except OSError as error:
            raise UserError(
                f"gallery picture {path}: {error.strerror}; keep the pictures beside results.json or compare again"
            ) from error
        if not data.startswith(_PNG_SIGNATURE):
            raise UserError(f"gallery picture {path}: not a PNG file; run `dgpo-bench compare` again")
        title = "Base" if name == "base" else results.label(name)
        uri = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        pictures.append(Picture(title, uri, f"Samples of {title}, one per prompt: {prompts}"))
    return pictures


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=110)
