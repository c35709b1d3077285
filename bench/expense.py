"""What a whole comparison will take, training and measuring, before anything of it is done: ``dgpo-bench plan``."""

from __future__ import annotations

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training.plan import GIB, make_plan

from .forecast import base_evaluations, best_of_pictures, cell_evaluations, curve_pictures, pictures_of
from .gpu.flops import Flops, skeleton_flops
from .plan import Plan
from .prompt_sets import SampledSet, sampled_sets


def expense_rows(plan: Plan) -> list[tuple[str, str]]:
    """What the command prints, (label, value): evaluations of the denoiser, pictures, operations and memory.

    Raises:
        UserError: a prompt set that is not there.
    """
    sets = sampled_sets(plan.task, plan.size)
    cells, budget = len(plan.cells), plan.size.evaluations
    training, base, each = budget * cells, base_evaluations(plan, sets), cell_evaluations(plan, sets)
    total = training + base + each * cells
    return [
        ("cells", f"{cells}: {', '.join(plan.entries)}; {len(plan.seeds)} seeds"),
        ("processes", "1 a cell" if plan.processes == 1 else f"{plan.processes} a cell, which share its work"),
        ("training", f"{training:,} denoiser evaluations, {budget:,} a cell ({training / total:.0%} of all)"),
        ("measuring the base", f"{base:,} ({len(plan.guidances)} guidances)"),
        ("measuring the cells", f"{each * cells:,}, at most {each:,} a cell"),
        ("prompts", ", ".join(f"{name} {len(one.prompts)} x {one.images} pictures" for name, one in sets.items())),
        ("pictures measured", f"{_pictures(plan, sets):,}"),
        *_on_the_device(plan, training, base + each * cells),
    ]


def _pictures(plan: Plan, sets: dict[str, SampledSet]) -> int:
    """Pictures that every metric of their set looks at, in all."""
    (validation, tested), guidances = pictures_of(sets), len(plan.guidances)
    base = (validation + tested) * guidances + best_of_pictures(plan, sets)
    cell = curve_pictures(plan, sets) + validation * guidances + tested
    return base + cell * len(plan.cells)


def _on_the_device(plan: Plan, training: int, measuring: int) -> list[tuple[str, str]]:
    """Operations and memory, from the model's configuration files; why not, where these are not here."""
    configs = {entry: plan.run_config(entry, plan.seeds[0]) for entry in plan.entries}
    first = configs[plan.entries[0]]
    try:
        peaks = {entry: make_plan(config, plan.processes).peak for entry, config in configs.items()}
        flops = skeleton_flops(first.model, first.lora)
    except UserError as error:
        return [("memory", f"cannot be told here: {error}")]
    largest = max(peaks, key=lambda entry: peaks[entry])
    operations = _operations(flops, training, measuring)
    return [
        ("operations", f"{operations[0]:.2g} to {operations[1]:.2g} floating-point operations"),
        ("memory", f"{peaks[largest] / GIB:.1f} GiB at most on each device ({largest}), metrics not counted"),
    ]


def _operations(flops: Flops, training: int, measuring: int) -> tuple[float, float]:
    """Between which numbers all operations lie: every training evaluation a forward, or a third of a whole pass."""
    ends = sorted((flops.forward, flops.training / 3))
    return ends[0] * training + flops.forward * measuring, ends[1] * training + flops.forward * measuring
