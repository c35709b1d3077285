"""The ``dgpo-bench`` command. Everything that takes long to import is imported by the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError

from .finished_commands import add_metric, draw_again, keep_option, sweep
from .machine_commands import gpu, throughput

if TYPE_CHECKING:
    from .records import Results

best_option = click.option(
    "--best-checkpoint/--no-best-checkpoint",
    default=None,
    help="Keep and measure each cell's best checkpoint on validation prompts too.  [default: the size's]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Compare algorithms at equal cost, in domain and out of domain, and measure how fast they train here."""


def _draw(folder: Path) -> list[str]:
    """Draw the report of a folder's results, and say what stands at its top and where it is."""
    from .report.page import write_report
    from .report.verdict import conclusions

    path = write_report(folder)
    return [*conclusions(folder), f"report: {path}"]


def _kept(results: Results, folder: Path) -> list[str]:
    """What the kept pictures take, where any were kept."""
    from .kept import counted

    return [] if results.kept is None else [counted(results.kept, folder)]


@main.command()
@click.argument("preset")
@click.option("--algorithms", help="Names, comma-separated, or all.  [default: the preset's usual ones]")
@click.option(
    "--size", default="default", show_default=True, help="How much it spends, of the preset: quick, default, full."
)
@click.option(
    "--seeds", type=click.IntRange(1), help="Runs of each algorithm, with seeds from 0 on.  [default: the size's]"
)
@click.option("--evaluations", type=int, help="Denoiser evaluations of training per run.  [default: the size's]")
@click.option("--flops", type=float, help="The budget in measured operations of the denoiser, as in 5e14, instead.")
@click.option(
    "--controls",
    help="Comma-separated: zero (no reward), shuffled (rewards dealt out at random in each group), half (weight of a "
    "half), best (fine-tuning on the best of each group), best-of-n; or all, none.  [default: the size's]",
)
@best_option
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this comparison.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once.  [default: as many as GPUs do; on a CPU 2]")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Of each run, a GPU each.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of each process.  [default: cores / processes at once]"
)
@click.option("--only", metavar="ENTRY:SEED", help="One cell alone, for cluster jobs; base measures the base, first.")
@click.option("--retry", is_flag=True, help="Do failed cells again.")
@keep_option
@reports_user_errors
def compare(
    preset: str,
    algorithms: str | None,
    size: str,
    seeds: int | None,
    evaluations: int | None,
    flops: float | None,
    controls: str | None,
    best_checkpoint: bool | None,
    output: Path | None,
    jobs: int | None,
    processes: int,
    threads: int | None,
    only: str | None,
    retry: bool,
    keep_pictures: bool,
) -> None:
    """Train every algorithm with every seed for the same budget and draw the report.

    PRESET is a shipped comparison's name or a YAML file. The budget is counted in denoiser evaluations, or in measured
    operations; both mean the same on every machine. How long it takes here is measured and said first.
    """
    from .workers import importing_ahead, signals_as_exit

    if only is None:
        click.get_current_context().with_resource(importing_ahead())
    from rich.console import Console

    from . import compare as comparing
    from .asked import asked_cell, asked_plan, take_tuning
    from .display import Display
    from .expense import keeping

    cell = asked_cell(only)
    plan = asked_plan(preset, algorithms, size, (seeds, evaluations, controls), 1 if only else jobs, processes, flops)
    if threads is not None:
        plan = plan.model_copy(update={"threads": threads})
    plan = plan.with_best(best_checkpoint).model_copy(update={"keep_pictures": keep_pictures})
    folder = output or Path("runs") / f"compare-{plan.preset_name}"
    console = Console()
    if keep_pictures:
        console.print(keeping(plan), highlight=False, soft_wrap=True)
    with signals_as_exit(), Display(console) as display:
        if cell is not None:
            if retry:
                comparing.forget_failed(plan, folder)
            comparing.run_only(plan, folder, *cell, display)
            console.print(f"done; `dgpo-bench report {folder}` gathers what is there", soft_wrap=True, highlight=False)
            return
        take_tuning(preset, folder)
        results = comparing.compare(plan, folder, display, retry=retry)
    for line in [*comparing.failures(results), *_kept(results, folder), *_draw(folder), plan.size.caution]:
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


@main.command()
@click.argument("preset")
@click.option("--algorithms", help="As for compare.")
@click.option("--size", default="default", show_default=True, help="As for compare.")
@click.option("--seeds", type=click.IntRange(1), help="As for compare.")
@click.option("--evaluations", type=int, help="As for compare.")
@click.option("--flops", type=float, help="As for compare.")
@click.option("--controls", help="As for compare.")
@best_option
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="As for compare.")
@click.option("--cells", is_flag=True, help="Print the cells alone, in a line, as compare --only names them.")
@reports_user_errors
def plan(
    preset: str,
    algorithms: str | None,
    size: str,
    seeds: int | None,
    evaluations: int | None,
    flops: float | None,
    controls: str | None,
    best_checkpoint: bool | None,
    processes: int,
    cells: bool,
) -> None:
    """Say what a comparison takes, training and measuring, and how small a difference it can show; nothing is run."""
    from dgpo_plugin.common.tables import as_table

    from .asked import asked_plan, check_split
    from .expense import expense_rows
    from .report.power import paired_deviation, power_sentence

    asked = asked_plan(preset, algorithms, size, (seeds, evaluations, controls), 1, flops=flops)
    check_split(asked, processes)  # but not whether this computer has as many GPUs
    if cells:
        click.echo(" ".join(f"{entry}:{seed}" for entry, seed in asked.cells))
        return
    click.echo(as_table(expense_rows(asked.with_best(best_checkpoint).spread(1, processes))))
    click.echo(power_sentence(0.03, paired_deviation(0.5), 0.02))


@main.command()
@click.argument("preset")
@click.option("--trials", default=16, show_default=True, type=click.IntRange(1), help="Of each algorithm.")
@click.option("--algorithms", help="As for compare.")
@click.option("--size", default="quick", show_default=True, help="Whose budget and validation prompts a trial has.")
@click.option("--evaluations", type=int, help="Denoiser evaluations of training per trial.  [default: the size's]")
@click.option("--flops", type=float, help="The budget in measured operations of the denoiser instead.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; compare with the same one shows the trials.")
@click.option("--jobs", type=click.IntRange(1), help="Trials at once.  [default: one per GPU; on a CPU 2]")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Of each trial, a GPU each.")
@reports_user_errors
def tune(
    preset: str,
    trials: int,
    algorithms: str | None,
    size: str,
    evaluations: int | None,
    flops: float | None,
    output: Path | None,
    jobs: int | None,
    processes: int,
) -> None:
    """Try random settings from the preset's ranges, as many of each algorithm, on validation prompts alone.

    What is drawn is written to tuning.json first; the same command goes on where it was stopped.
    """
    from .workers import importing_ahead

    click.get_current_context().with_resource(importing_ahead())
    from rich.console import Console

    from .asked import asked_plan, split
    from .display import Display
    from .tune import tune as search

    plan = asked_plan(preset, algorithms, size, (1, evaluations, "none"), 1, flops=flops)
    plan = split(plan, jobs, processes, trials)
    folder = output or Path("runs") / f"compare-{plan.preset_name}"
    console = Console()
    with Display(console) as display:
        tuning = search(plan, folder, trials, display)
    sign = 1 if plan.task.metric(plan.task.headline_metric).better == "higher" else -1
    for entry in plan.entries:
        done = [trial for trial in tuning.done() if trial.entry == entry and trial.value is not None]
        for trial in sorted(done, key=lambda trial: -sign * (trial.value or 0))[:3]:
            settings = ", ".join(f"{key}={value}" for key, value in trial.settings.items())
            console.print(f"{entry}: {trial.value:.3f} with {settings}", soft_wrap=True, highlight=False, markup=False)


@main.command()
@click.argument("task")
@reports_user_errors
def validate(task: str) -> None:
    """Check a task before anything is spent on it: its fields, its prompts, its metrics. TASK: a name or a YAML file.

    Prompts that are trained or chosen on and are in another set too are refused, and metrics whose package or server
    is missing.
    """
    from .measures import check_metrics, relation
    from .prompt_sets import check_prompts
    from .task import load_task

    loaded = load_task(task)
    missing = check_metrics(loaded)
    counts = check_prompts(loaded)
    click.echo(f"{loaded.name}, version {loaded.version}: {loaded.description}".rstrip(": "))
    for where, count in counts.items():
        click.echo(f"  {where}: {count} prompts")
    for name in loaded.metric_names():
        note = f"; missing, and left out: {missing[name]}" if name in missing else ""
        mark = ", the headline" if name == loaded.headline_metric else ""
        click.echo(f"  metric {name}: {relation(loaded, name)}{mark}{note}")


@main.command()
@click.argument("source", metavar="PRESET_OR_TASK")
@click.option(
    "--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="Adapter file or folder, repeatable."
)
@click.option("--base", is_flag=True, help="Measure the base alone, without any adapter.")
@click.option("--model", help="Of a task: the base model's path, as in a run's configuration.")
@click.option("--size", default="default", show_default=True, help="The size whose prompts are taken.")
@click.option("--guidance", "guidances", multiple=True, type=click.FloatRange(1), help="To choose from, repeatable.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="That measure, a GPU each.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; continued if it holds this comparison.")
@keep_option
@reports_user_errors
def evaluate(
    source: str,
    adapters: tuple[Path, ...],
    base: bool,
    model: str | None,
    size: str,
    guidances: tuple[float, ...],
    processes: int,
    output: Path | None,
    keep_pictures: bool,
) -> None:
    """Compare finished adapters, whoever made them, with the base and one another, and draw the report.

    Each is applied at its true scale, and shown at the guidance that suits it best on validation prompts.
    """
    from .adapters import evaluate_adapters, named_adapters
    from .asked import source_of, split
    from .expense import keeping
    from .plan import Plan
    from .preset import name_of

    if not adapters and not base:
        raise UserError("nothing to measure; give --adapter FILE, or --base")
    preset, task = source_of(source, model)
    chosen = preset.sized(size, seeds=1, controls="none")
    if guidances:
        chosen = chosen.model_copy(update={"guidances": tuple(sorted({*guidances}))})
        preset = preset.model_copy(update={"guidance": min(guidances)})
    named = named_adapters(adapters)
    name = name_of(source)
    plan = Plan.of(name, preset, task, size, chosen, [], jobs=1)  # type: ignore[arg-type]  # sized() knows the size
    plan = plan.model_copy(update={"entries": list(named), "adapters": named, "keep_pictures": keep_pictures})
    plan = split(plan, 1, processes)
    folder = output or Path("runs") / f"evaluate-{name}"
    if keep_pictures:
        click.echo(keeping(plan))
    results = evaluate_adapters(plan, folder)
    click.echo(f"base: guidance {results.base_guidance:g} suits it best")
    for cell in results.cells:
        click.echo(f"{cell.entry}: guidance {cell.guidance:g}")
    for line in [*_kept(results, folder), *_draw(folder)]:
        click.echo(line)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@reports_user_errors
def report(folder: Path) -> None:
    """Gather what is there of a comparison or a sweep, and draw its page again."""
    click.echo(str(draw_again(folder)))


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("leaderboard.html"),
    show_default=True,
    help="HTML file; the tables as Markdown lie beside it.",
)
@reports_user_errors
def leaderboard(folders: tuple[Path, ...], output: Path) -> None:
    """Put several comparisons onto one page; those of a task that were measured differently are refused."""
    from .report.leaderboard import write_leaderboard

    click.echo(str(write_leaderboard(folders, output)))


@main.command("list")
@click.argument("what", type=click.Choice(["comparisons", "tasks"]), default="comparisons")
@reports_user_errors
def list_(what: str) -> None:
    """List the shipped comparisons, or the tasks that they are made of."""
    from .preset import bench_preset_names, load_preset
    from .task import load_task, task_names

    if what == "tasks":
        for name in task_names():
            task = load_task(name)
            metrics = ", ".join(each.metric for each in task.in_domain)
            click.echo(f"{name} (version {task.version}): {task.description} ({', '.join(task.rewards)}; {metrics})")
        return
    for name in bench_preset_names():
        preset, _ = load_preset(name)
        click.echo(f"{name}: {preset.description} (task {preset.task}; {', '.join(preset.algorithms)})")


for _command in (sweep, add_metric, throughput, gpu):
    main.add_command(_command)


if __name__ == "__main__":
    main()
