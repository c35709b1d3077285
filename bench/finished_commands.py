"""The commands of ``dgpo-bench`` for what was trained or measured before: ``sweep`` and ``add-metric``."""

from __future__ import annotations

from pathlib import Path

import click

from dgpo_plugin.commands.terminal import reports_user_errors

keep_option = click.option(
    "--keep-pictures", is_flag=True, help="Keep every measured picture, lossless, for `dgpo-bench add-metric` of later."
)


@click.command()
@click.argument("source", metavar="PRESET_OR_TASK")
@click.option("--adapter", required=True, type=click.Path(path_type=Path), help="Adapter file or folder.")
@click.option("--model", help="Of a task: the base model's path, as in a run's configuration.")
@click.option("--strengths", help="Comma-separated; 0 is the base.  [default: 0,0.25,0.5,0.75,1,1.25,1.5]")
@click.option("--steps", help="Of the sampler, comma-separated.  [default: 10,20,40 and the task's]")
@click.option("--guidances", help="Comma-separated, from 1 on.  [default: the task's]")
@click.option("--prompts", default=60, show_default=True, type=int, help="Of each prompt set at most, two pictures.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this sweep.")
@keep_option
@reports_user_errors
def sweep(
    source: str,
    adapter: Path,
    model: str | None,
    strengths: str | None,
    steps: str | None,
    guidances: str | None,
    prompts: int,
    output: Path | None,
    keep_pictures: bool,
) -> None:
    """Find the strength, the steps and the guidance that suit a finished adapter, whoever made it, and draw the page.

    One axis at a time, with the untrained base beside it: the guidances at strength 1 and the task's steps, then
    strengths and steps at the best of them. Validation prompts and out-of-domain ones; test prompts are not read.
    """
    from rich.console import Console

    from .adapters import named_adapters
    from .asked import asked_sweep
    from .kept import counted, expected
    from .meter import Meter
    from .preset import name_of
    from .report.sweep_page import sweep_conclusions, write_sweep_report
    from .sweep import sweep as measure
    from .sweep import sweep_cost
    from .workers import signals_as_exit

    folder = output or Path("runs") / f"sweep-{name_of(source)}-{next(iter(named_adapters([adapter])))}"
    plan = asked_sweep(source, model, adapter, (strengths, steps, guidances), prompts, keep_pictures, folder)
    console = Console()
    settings, pictures, evaluations = sweep_cost(plan)
    said = f"{settings} settings, {pictures:,} pictures, {evaluations:,} denoiser evaluations at most"
    console.print(said, highlight=False, soft_wrap=True)
    if keep_pictures:
        from .expense import picture_size

        console.print(expected(pictures, *picture_size(plan.plan)), highlight=False, soft_wrap=True)
    with signals_as_exit(), Meter(console, "sweep", "denoiser evaluations") as meter:
        record = measure(plan, folder, meter)
    kept = [] if record.kept is None else [counted(record.kept, folder)]
    path = write_sweep_report(folder)
    for line in [*sweep_conclusions(folder), *kept, f"report: {path}"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


@click.command("add-metric")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("metrics", nargs=-1, required=True, metavar="METRIC...")
@reports_user_errors
def add_metric(folder: Path, metrics: tuple[str, ...]) -> None:
    """Score the pictures that a comparison, evaluation or sweep kept, and draw its page again with the new columns.

    FOLDER was made with --keep-pictures. METRIC is a reward as in `dgpo list rewards`, your own file.py:Name, a metric
    of the task that was missing, or NAME={reward: remote, options: {...}} as in a task's metrics.
    """
    from rich.console import Console

    from .added import add_metrics
    from .meter import Meter
    from .records import RESULTS_FILE
    from .sweep_records import SWEEP_FILE

    console = Console()
    if not ((folder / RESULTS_FILE).exists() or (folder / SWEEP_FILE).exists()):  # it was stopped
        gather_what_is_there(folder)
    with Meter(console, "scoring", "pictures") as meter:
        add_metrics(folder, metrics, meter)
    console.print(f"report: {draw_again(folder)}", highlight=False, soft_wrap=True, markup=False)


def gather_what_is_there(folder: Path) -> None:
    """Put together what a comparison's cells, or a sweep, have found so far, once there is anything."""
    from .claim import plan_of
    from .gather import gather
    from .plan import base_file

    if is_sweep(folder):
        from .sweep import gather_sweep  # and with it diffusers, which a comparison's page has no use for
        from .sweep_records import sweep_plan_of

        swept = sweep_plan_of(folder)
        if swept is not None:
            gather_sweep(swept, folder)
        return
    plan = plan_of(folder)
    if plan is not None and base_file(folder).exists():
        gather(plan, folder)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's, finished or not, and no comparison's."""
    from .sweep_records import START_FILE, SWEEP_FILE

    return (folder / SWEEP_FILE).exists() or (folder / START_FILE).exists()


def draw_again(folder: Path) -> Path:
    """Gather what is there, and draw the page of a comparison or of a sweep."""
    from .report.page import write_report
    from .report.sweep_page import write_sweep_report

    gather_what_is_there(folder)
    return write_sweep_report(folder) if is_sweep(folder) else write_report(folder)
