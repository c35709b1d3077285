"""What a command line asks for, as a plan: a preset, its size, and what is changed of it."""

from __future__ import annotations

import math
from pathlib import Path

from dgpo_plugin.common.errors import UserError, prefixed

from .devices import gpu_count, runs_at_once
from .gather import TUNING_FILE, read_tuning
from .plan import Plan
from .preset import Preset, bench_preset_names, is_file_name, load_preset, name_of, preset_of_task
from .records import write_record
from .sweep_records import MOST_STEPS, STEPS, STRENGTHS, SweepPlan, parse_axis
from .task import Task, task_names


def asked_plan(
    preset: str,
    algorithms: str | None,
    size: str,
    changes: tuple[int | None, int | None, str | None],
    jobs: int | None,
    processes: int = 1,
    flops: float | None = None,
) -> Plan:
    """The plan of a comparison, with the size's seeds, budget and controls changed where others are given.

    Args:
        jobs: runs at once; None for as many as this computer has room for.
        processes: of each run.
        flops: the budget in operations, in the place of evaluations.

    Raises:
        UserError: a mistake in any of it, or more processes than there are GPUs or an iteration can be split over.
    """
    loaded, task = load_preset(preset)
    chosen = loaded.sized(size, *changes, flops)
    plan = Plan.of(name_of(preset), loaded, task, size, chosen, loaded.chosen(algorithms), jobs=1)  # type: ignore[arg-type]  # sized() knows the size
    return split(plan, jobs, processes)


def split(plan: Plan, jobs: int | None, processes: int, trials: int = 1) -> Plan:
    """A plan with so many runs at once, None for as many as there is room for, of so many processes each.

    Args:
        trials: of each cell.

    Raises:
        UserError: more than there are GPUs for or an iteration can be split over.
    """
    check_split(plan, processes)
    at_once = runs_at_once(jobs, gpu_count(), processes)
    return plan.spread(min(at_once, max(1, len(plan.cells) * trials)), processes)


def check_split(plan: Plan, processes: int) -> None:
    """Find out whether every entry has a configuration, and its iterations can be split over so many processes.

    Raises:
        UserError: a control that does not suit the challenger's algorithm, or as training says of processes.
    """
    trains = plan.entries and not plan.adapters
    configs = {entry: plan.run_config(entry, 0) for entry in plan.entries} if trains else {"base": plan.base_config()}
    if processes > 1:
        from dgpo_plugin.training.build import check_layout

        for entry, config in configs.items():
            with prefixed(f"--processes {processes}: {entry}"):
                check_layout(config, processes)


def asked_sweep(
    source: str,
    model: str | None,
    adapter: Path,
    axes: tuple[str | None, str | None, str | None],
    prompts: int,
    keep_pictures: bool,
    folder: Path,
) -> SweepPlan:
    """The plan of a sweep.

    Args:
        axes: strengths, steps and guidances, comma-separated; None for the usual ones.
        folder: that it may go on with.

    Raises:
        UserError: no such preset or task, a value that is none, no adapter, or the folder is for something else.
    """
    from .adapters import named_adapters
    from .sweep import content_hash, settled

    if prompts < 1:
        raise UserError(f"--prompts {prompts}: give one or more")
    strengths, steps, guidances = axes
    tried = parse_axis("--strengths", strengths, float, 0, math.inf) if strengths is not None else list(STRENGTHS)
    if not any(tried):
        raise UserError(f"--strengths {strengths}: names 0 alone, which is the base; name a strength of the adapter")
    numbers = parse_axis("--steps", steps, int, 1, MOST_STEPS) if steps is not None else []
    chosen = parse_axis("--guidances", guidances, float, 1, math.inf) if guidances is not None else []
    preset, task = source_of(source, model)
    size = preset.sized("default", seeds=1, controls="none")
    plan = Plan.of(name_of(source), preset, task, "default", size, [], jobs=1)
    plan = plan.model_copy(update={"keep_pictures": keep_pictures})
    asked = SweepPlan(
        plan=plan,
        adapter=str(adapter),
        label=next(iter(named_adapters([adapter]))),
        adapter_sha256=content_hash(adapter),
        strengths=tried,
        steps=[int(each) for each in numbers] or sorted({*STEPS, task.sampling.steps}),
        guidances=chosen or plan.guidances,
        prompts=prompts,
    )
    return settled(asked, folder)


def source_of(source: str, model: str | None) -> tuple[Preset, Task]:
    """The preset and task that finished adapters are measured with: a comparison's, or a task's with a model.

    Raises:
        UserError: no such preset or task, or a task without a model.
    """
    is_task = model is not None or (source in task_names() and source not in bench_preset_names())
    return preset_of_task(source, model) if is_task else load_preset(source)


def asked_cell(only: str | None) -> tuple[str, int] | None:
    """What ``--only`` names: an entry and a seed."""
    if only is None:
        return None
    entry, separator, seed = only.rpartition(":")
    if only == "base":
        return "base", -1
    if not separator or not seed.isdecimal():
        raise UserError(f"--only {only}: write it as ENTRY:SEED, as in dgpo:0, or base")
    return entry, int(seed)


def take_tuning(preset: str, folder: Path) -> None:
    """Have a comparison show the trials that lie beside its preset's file, unless its folder has its own."""
    beside = Path(preset).parent / TUNING_FILE
    if is_file_name(preset) and beside.is_file() and not (folder / TUNING_FILE).exists():
        write_record(read_tuning(beside), folder / TUNING_FILE)
