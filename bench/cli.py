"""The ``dgpo-bench`` command."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import click
from rich.console import Console

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError, did_you_mean

from .devices import gpu_count, runs_at_once
from .display import Display
from .preset import Preset, Size


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Measure what DGPO gains over Flow-GRPO, in domain and out of domain."""


@main.command()
@click.argument("preset")
@click.option("--algorithms", help="Comma-separated; all of the preset's if left out.")
@click.option(
    "--size", default="default", show_default=True, help="What it spends, of the preset: quick, default, full."
)
@click.option("--seeds", type=click.IntRange(1), help="How many, from 0 on.  [default: the size's]")
@click.option("--evaluations", type=int, help="Denoiser evaluations of training a run.  [default: the size's]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this comparison.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once.  [default: one a GPU; on a CPU 2]")
@click.option("--threads", type=click.IntRange(1), help="Threads a run.  [default: cores / jobs]")
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
    from .compare import compare as run_comparison
    from .guidance import base_sentence
    from .plan import Plan
    from .preset import load_preset
    from .results import read_results
    from .statistics import CHALLENGER, display_name, verdict

    loaded = load_preset(preset)
    chosen = sized(loaded, size, seeds, evaluations)
    names = [name.strip() for name in algorithms.split(",")] if algorithms else list(loaded.algorithms)
    loaded.check_algorithms(names)
    folder = output or Path("runs") / f"compare-{Path(preset).stem}"
    cores = os.cpu_count() or 1
    jobs = min(runs_at_once(jobs, gpu_count()), len(names) * chosen.seeds)
    plan = Plan(
        preset_name=Path(preset).stem,
        preset=loaded,
        size_name=size,
        size=chosen,
        algorithms=names,
        seeds=list(range(chosen.seeds)),
        jobs=jobs,
        threads=threads or max(1, cores // jobs),
    )
    console = Console()
    with Display(console) as display:
        report = run_comparison(plan, folder, display)
    results = read_results(folder / "results.json")
    for line in (verdict(results), base_sentence(results, CHALLENGER, display_name(CHALLENGER)), chosen.caution):
        if line:
            console.print(line, highlight=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("preset")
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file; none for the base model.")
@click.option("--size", default="default", show_default=True, help="Whose prompts: quick, default, full.")
@click.option("--guidance", type=click.FloatRange(1), help="Of the sampler.  [default: the preset's]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file; standard output if left out.")
@reports_user_errors
def evaluate(preset: str, adapter: Path | None, size: str, guidance: float | None, output: Path | None) -> None:
    """Score an adapter with a preset's own evaluation, in domain and out of domain."""
    from dgpo_plugin.adapters.load import apply_adapter
    from dgpo_plugin.common.files import write_text_atomically
    from dgpo_plugin.distributed.device import best_device
    from dgpo_plugin.models import load_model
    from dgpo_plugin.models.policy import Policy

    from .evaluate import make_evaluator
    from .preset import load_preset

    loaded = load_preset(preset)
    config = loaded.run_config(next(iter(loaded.algorithms)), 0)
    # Not in half precision unless asked for: the same numbers on every processor.
    precise = config.model.model_copy(update={"precision": "fp32"} if config.model.precision == "auto" else {})
    base = Policy(load_model(precise, best_device()), config.lora, 0)
    evaluator = make_evaluator(loaded.evaluation, sized(loaded, size, None, None), base)
    policy = base
    if adapter is not None:
        model = load_model(precise, best_device())
        apply_adapter(model, adapter)
        # An untrained LoRA on top changes nothing.
        policy = Policy(model, config.lora, 0)
    text = json.dumps(evaluator.measure(policy, policy.copy_weights(), guidance), indent=1)
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
    from dgpo_plugin.config.load import load_config

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
    from dgpo_plugin.common.errors import UserError
    from dgpo_plugin.common.files import write_text_atomically
    from dgpo_plugin.distributed.device import runs_on_cpu

    from .gpu.results import read_results
    from .gpu.rows import ROWS, chosen
    from .gpu.session import measure
    from .gpu.table import markdown
    from .workers import sigterm_as_exit

    if runs_on_cpu() and not rehearsal:
        raise UserError("no GPU here; --rehearsal runs every row on the processor with tiny models")
    rows = chosen(only)
    read_results(output)  # refused now rather than after the first row
    missing = [row.name for row in rows]
    say = functools.partial(click.echo, err=True)
    try:
        with sigterm_as_exit():
            missing = measure(rows, output, minutes, say, tiny=rehearsal, again=only is not None)
    finally:
        results = read_results(output)
        text = markdown(results, [row.name for row in ROWS], [name for name in missing if name not in results])
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomically(output / "gpu.md", text)
    click.echo(text)
    if not any(result.status == "measured" for name, result in results.items() if name != "card"):
        raise UserError(f"no row could be measured here; {output / 'gpu.md'} says why, row by row")


@main.command("list")
@reports_user_errors
def list_() -> None:
    """List the shipped comparisons."""
    from .preset import bench_preset_names, load_preset

    for name in bench_preset_names():
        preset = load_preset(name)
        click.echo(f"{name}: {preset.description} ({', '.join(preset.algorithms)})")


def sized(preset: Preset, name: str, seeds: int | None, evaluations: int | None) -> Size:
    """A size of a preset, with what the command line changes of it.

    Raises:
        UserError: no such size, or a budget of nothing.
    """
    size = preset.sizes.get(name)  # type: ignore[call-overload]
    if size is None:
        raise UserError(f"--size {name}: choose quick, default or full{did_you_mean(name, list(preset.sizes))}")
    if evaluations is not None and evaluations <= 0:
        raise UserError(f"--evaluations {evaluations}: must be more than nothing")
    changes = {"seeds": seeds, "evaluations": evaluations}
    changed: Size = size.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return changed


if __name__ == "__main__":
    main()
