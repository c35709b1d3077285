"""The ``dgpo-bench`` command."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dgpo_plugin.cli import reports_user_errors
from dgpo_plugin.errors import UserError

from .plan import Event
from .results import Budget


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Measure what DGPO gains over Flow-GRPO, in domain and out of domain."""


@main.command()
@click.argument("preset")
@click.option("--algorithms", help="Comma-separated; all of the preset's if left out.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How many, from 0 on.")
@click.option("--budget", help="Training time a run, such as 120s or 2m.  [default: 75s]")
@click.option("--evaluations", type=int, help="Denoiser evaluations a run, instead of --budget.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this comparison.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Runs at once.")
@click.option("--threads", type=click.IntRange(1), help="Threads a run.  [default: cores / jobs]")
@reports_user_errors
def compare(
    preset: str,
    algorithms: str | None,
    seeds: int,
    budget: str | None,
    evaluations: int | None,
    output: Path | None,
    jobs: int,
    threads: int | None,
) -> None:
    """Train every algorithm with every seed for the same budget and draw the report.

    PRESET is a shipped comparison's name or a YAML file.
    """
    from .compare import compare as run_comparison
    from .plan import Plan
    from .preset import load_preset
    from .results import read_results
    from .statistics import verdict

    if budget is not None and evaluations is not None:
        raise UserError("--budget and --evaluations: give one of the two")
    loaded = load_preset(preset)
    names = [name.strip() for name in algorithms.split(",")] if algorithms else list(loaded.algorithms)
    loaded.check_algorithms(names)
    folder = output or Path("runs") / f"compare-{Path(preset).stem}"
    cores = os.cpu_count() or 1
    jobs = min(jobs, len(names) * seeds)
    plan = Plan(
        preset_name=Path(preset).stem,
        preset=loaded,
        algorithms=names,
        seeds=list(range(seeds)),
        budget=parse_budget(budget or "75s") if evaluations is None else evaluations_budget(evaluations),
        jobs=jobs,
        threads=threads or max(1, cores // jobs),
    )
    console = Console()
    with _Display(console) as display:
        report = run_comparison(plan, folder, display.listen)
    results = read_results(folder / "results.json")
    console.print(verdict(results), highlight=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("preset")
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file; none for the base model.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file; standard output if left out.")
@reports_user_errors
def evaluate(preset: str, adapter: Path | None, output: Path | None) -> None:
    """Score an adapter with a preset's own evaluation, in domain and out of domain."""
    from dgpo_plugin.export import apply_adapter
    from dgpo_plugin.files import write_text_atomically
    from dgpo_plugin.lora import Policy
    from dgpo_plugin.models import load_model
    from dgpo_plugin.processes import best_device

    from .evaluate import make_evaluator
    from .preset import load_preset

    loaded = load_preset(preset)
    config = loaded.run_config(next(iter(loaded.algorithms)), 0)
    # Not in half precision unless asked for: the same numbers on every processor.
    precise = config.model.model_copy(update={"precision": "fp32"} if config.model.precision == "auto" else {})
    base = Policy(load_model(precise, best_device()), config.lora, 0)
    evaluator = make_evaluator(loaded.evaluation, base)
    policy = base
    if adapter is not None:
        model = load_model(precise, best_device())
        apply_adapter(model, adapter)
        # An untrained LoRA on top changes nothing.
        policy = Policy(model, config.lora, 0)
    text = json.dumps(evaluator.measure(policy, policy.copy_weights()), indent=1)
    if output is None:
        click.echo(text)
    else:
        write_text_atomically(output, text + "\n")


@main.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field, repeatable.")
@click.option("--iterations", default=8, show_default=True, type=click.IntRange(1), help="To time, after one more.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write as well.")
@reports_user_errors
def throughput(config: str, overrides: tuple[str, ...], iterations: int, output: Path | None) -> None:
    """Time training against the bare denoiser's rate on this machine. CONFIG as for `dgpo train`."""
    from dgpo_plugin.config_files import load_config

    from .throughput import measure, write_throughput

    loaded = load_config(config, overrides)
    console = Console(stderr=True)
    with console.status("starting") as status:
        measured = measure(config, loaded, iterations, status.update)
    rows = measured.rows()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        click.echo(f"{label:<{width}}  {value}")
    if output is not None:
        write_throughput(measured, output)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@reports_user_errors
def report(folder: Path) -> None:
    """Draw a comparison's curves.csv and report.html again from its results.json."""
    from .report import write_curves, write_report
    from .results import read_results

    write_curves(read_results(folder / "results.json"), folder / "curves.csv")
    click.echo(str(write_report(folder)))


@main.command("list")
@reports_user_errors
def list_() -> None:
    """List the shipped comparisons."""
    from .preset import bench_preset_names, load_preset

    for name in bench_preset_names():
        preset = load_preset(name)
        click.echo(f"{name}: {preset.description} ({', '.join(preset.algorithms)})")


def parse_budget(text: str) -> Budget:
    """``120s``, ``2m``, ``1h`` or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if not match:
        raise UserError(f"--budget {text}: write a time such as 120s, 2m or 1h")
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]
    if seconds <= 0:
        raise UserError(f"--budget {text}: must be more than nothing")
    return Budget(kind="seconds", amount=seconds)


def evaluations_budget(count: int) -> Budget:
    """A budget of denoiser evaluations; a forward counts 1, a backward 2."""
    if count <= 0:
        raise UserError(f"--evaluations {count}: must be more than nothing")
    return Budget(kind="evaluations", amount=count)


class _Display:
    """A bar a run on a terminal; a line an evaluation (and the first iteration) where output is piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def listen(self, event: Event) -> None:
        if event.run not in self._tasks:
            self._tasks[event.run] = self._progress.add_task(event.run, total=1.0, last="")
        self._progress.update(self._tasks[event.run], completed=event.share, last=event.text)
        if event.evaluated or (not self._console.is_terminal and event.text.startswith("iteration 1,")):
            self._progress.console.print(f"{event.run:<22} {event.share:4.0%}  {event.text}", highlight=False)


if __name__ == "__main__":
    main()
