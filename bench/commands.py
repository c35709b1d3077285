"""The ``dgpo-bench`` command. Everything that takes long to import is imported by the command that needs it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError

if TYPE_CHECKING:
    from .plan import Plan


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Compare algorithms at equal cost, in domain and out of domain, and measure how fast they train here."""


@main.command()
@click.argument("preset")
@click.option("--algorithms", help="Names, comma-separated.  [default: all of the preset's]")
@click.option(
    "--size", default="default", show_default=True, help="How much it spends, of the preset: quick, default, full."
)
@click.option(
    "--seeds", type=click.IntRange(1), help="Runs of each algorithm, with seeds from 0 on.  [default: the size's]"
)
@click.option("--evaluations", type=int, help="Denoiser evaluations of training per run.  [default: the size's]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this comparison.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once.  [default: one per GPU; on a CPU 2]")
@click.option("--threads", type=click.IntRange(1), help="Threads per run.  [default: cores / jobs]")
@reports_user_errors
def compare(
    preset: str,
    algorithms: str | None,
    size: str,
    seeds: int | None,
    evaluations: int | None,
    output: Path | None,
    jobs: int | None,
    threads: int | None,
) -> None:
    """Train every algorithm with every seed for the same budget and draw the report.

    PRESET is a shipped comparison's name or a YAML file. The budget is counted in denoiser evaluations, which mean the
    same on every machine; how long they take here is measured and shown before the runs start.
    """
    from rich.console import Console

    from .compare import compare as run_comparison
    from .devices import gpu_count, runs_at_once
    from .display import Display
    from .plan import Plan
    from .preset import load_preset
    from .workers import signals_as_exit

    loaded = load_preset(preset)
    chosen = loaded.sized(size, seeds, evaluations)
    names = [name.strip() for name in algorithms.split(",")] if algorithms is not None else list(loaded.algorithms)
    loaded.check_algorithms(names)
    name = Path(preset).stem
    jobs = min(runs_at_once(jobs, gpu_count()), len(names) * chosen.seeds)
    plan = Plan.of(name, loaded, size, chosen, names, jobs=jobs)  # type: ignore[arg-type]  # sized() knows the size
    if threads is not None:
        plan = plan.model_copy(update={"threads": threads})
    folder = output or Path("runs") / f"compare-{name}"
    console = Console()
    with signals_as_exit(), Display(console) as display:
        report = run_comparison(plan, folder, display)
    for line in _conclusions(plan, folder):
        console.print(line, highlight=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


def _conclusions(plan: Plan, folder: Path) -> Sequence[str]:
    """The sentences that stand at the top of the report."""
    from .report.guidance import base_sentence
    from .report.verdict import verdict
    from .results import read_results

    results = read_results(folder / "results.json")
    sentences = verdict(results), base_sentence(results, results.challenger), plan.size.caution
    return [sentence for sentence in sentences if sentence]


@main.command()
@click.argument("preset")
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file; none for the base model.")
@click.option(
    "--size", default="default", show_default=True, help="The size whose prompts are taken: quick, default, full."
)
@click.option("--guidance", type=click.FloatRange(1), help="Guidance of the sampler.  [default: the preset's]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file; standard output if left out.")
@reports_user_errors
def evaluate(preset: str, adapter: Path | None, size: str, guidance: float | None, output: Path | None) -> None:
    """Score an adapter with a preset's own evaluation, in domain and out of domain."""
    from dgpo_plugin.common.files import write_text_atomically

    from .evaluate import evaluate_adapter
    from .preset import load_preset

    text = json.dumps(evaluate_adapter(load_preset(preset), adapter, size, guidance), indent=1)
    if output is None:
        click.echo(text)
    else:
        write_text_atomically(output, text + "\n")


@main.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field, repeatable.")
@click.option(
    "--iterations", default=8, show_default=True, type=click.IntRange(1), help="To time, after two that warm up."
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write as well.")
@reports_user_errors
def throughput(config: str, overrides: tuple[str, ...], iterations: int, output: Path | None) -> None:
    """Time training against the bare denoiser's rate on this machine. CONFIG as for `dgpo train`."""
    from rich.console import Console

    from dgpo_plugin.common.tables import as_table
    from dgpo_plugin.config.load import load_config

    from .throughput import measure, write_throughput

    loaded = load_config(config, overrides)
    with Console(stderr=True).status("starting") as status:
        measured = measure(config, loaded, iterations, status.update)
    click.echo(as_table(measured.rows()))
    if output is not None:
        write_throughput(measured, output)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@reports_user_errors
def report(folder: Path) -> None:
    """Draw a comparison's curves.csv and report.html again from its results.json."""
    from .report.page import write_report

    click.echo(str(write_report(folder)))


@main.command()
@click.option("--minutes", default=8.0, show_default=True, type=click.FloatRange(0.1), help="No row is begun later.")
@click.option("--only", metavar="NAMES", help="Rows or models, comma-separated; measured again if they were.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True, help="Folder.")
@click.option("--rehearsal", is_flag=True, help="Tiny models on the processor: whether everything runs.")
@reports_user_errors
def gpu(minutes: float, only: str | None, output: Path, rehearsal: bool) -> None:
    """Measure full-size models with random weights on this GPU, the most telling rows first; no download.

    Every row is kept as soon as it is done, in gpu.jsonl; the same command goes on with those that are missing.
    """
    from dgpo_plugin.distributed.device import runs_on_cpu

    from .gpu.results import read_results
    from .gpu.rows import choose_rows
    from .gpu.session import measure
    from .gpu.table import write_table
    from .workers import signals_as_exit

    if runs_on_cpu() and not rehearsal:
        raise UserError("no GPU here; --rehearsal runs every row on the processor with tiny models")
    rows = choose_rows(only)
    read_results(output)  # refused now rather than after the first row
    missing = [row.name for row in rows]
    say = functools.partial(click.echo, err=True)
    try:
        with signals_as_exit():
            missing = measure(rows, output, minutes, say, tiny=rehearsal, again=only is not None)
    finally:
        text = write_table(output, missing)
    click.echo(text)
    if not any(result.status == "measured" for name, result in read_results(output).items() if name != "card"):
        raise UserError(f"no row could be measured here; {output / 'gpu.md'} says why, row by row")


@main.command("list")
@reports_user_errors
def list_() -> None:
    """List the shipped comparisons."""
    from .preset import bench_preset_names, load_preset

    for name in bench_preset_names():
        preset = load_preset(name)
        click.echo(f"{name}: {preset.description} ({', '.join(preset.algorithms)})")


if __name__ == "__main__":
    main()
