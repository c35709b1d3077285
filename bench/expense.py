"""What a whole comparison will take, training and measuring, before anything of it is done: ``dgpo-bench plan``."""

from __future__ import annotations

import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.load import model_skeleton
from dgpo_plugin.training.plan import GIB, make_plan

from .budget import expected_cost
from .forecast import (
    base_evaluations,
    base_pictures,
    best_evaluations,
    best_of_pictures,
    cell_evaluations,
    cell_pictures,
    guard_evaluations,
    guard_pictures,
)
from .gpu.flops import Flops, skeleton_flops
from .kept import expected
from .plan import Plan
from .prompt_sets import SampledSet, sampled_sets
from .size import Size


def expense_rows(plan: Plan) -> list[tuple[str, str]]:
    """What the command prints, (label, value): evaluations of the denoiser, pictures, operations and memory.

    Raises:
        UserError: a prompt set that is not there, or a budget in operations of a model that is not there.
    """
    sets = sampled_sets(plan.task, plan.size)
    cells, configs = len(plan.cells), {entry: plan.run_config(entry, plan.seeds[0]) for entry in plan.entries}
    base, each = base_evaluations(plan, sets), cell_evaluations(plan, sets)
    guarded = {entry: config for entry, config in configs.items() if config.training.guard is not None}
    looks = {entry: planned_iterations(config, plan.size) for entry, config in guarded.items()}
    watching = len(plan.seeds) * sum(guard_evaluations(configs[entry], count) for entry, count in looks.items())
    watched = len(plan.seeds) * sum(guard_pictures(configs[entry], count) for entry, count in looks.items())
    measuring = base + each * cells + watching
    return [
        ("cells", f"{cells}: {', '.join(plan.entries)}; {len(plan.seeds)} seeds"),
        ("processes", "1 a cell" if plan.processes == 1 else f"{plan.processes} a cell, which share its work"),
        ("training", _training(plan, measuring)),
        ("measuring the base", f"{base:,} ({len(plan.guidances)} guidances)"),
        ("measuring the cells", f"{each * cells:,}, at most {each:,} a cell"),
        *_of_the_best(plan, sets),
        *([("training.guard's looks", f"{watching:,}, {watched:,} pictures scored, at least")] if looks else []),
        ("prompts", ", ".join(f"{name} {len(one.prompts)} x {one.images} pictures" for name, one in sets.items())),
        ("pictures measured", f"{_pictures(plan, sets):,}"),
        *_on_the_device(plan, configs, measuring),
    ]


def keeping(plan: Plan) -> str:
    """What keeping every measured picture takes, said before any is drawn.

    Raises:
        UserError: a prompt set or the model is not there.
    """
    return expected(_pictures(plan, sampled_sets(plan.task, plan.size)), *picture_size(plan))


def picture_size(plan: Plan) -> tuple[int, int]:
    """Width and height of a plan's pictures, from the model's configuration files.

    Raises:
        UserError: the model is not there.
    """
    with torch.device("meta"), torch.no_grad():
        model = model_skeleton(plan.base_config().model)
    return model.width, model.height


def _training(plan: Plan, measuring: int) -> str:
    """The budget of all cells; in evaluations also as a share of everything."""
    size, cells = plan.size, len(plan.cells)
    if size.evaluations is None:
        return f"{size.budget * cells:.3g} floating-point operations of the denoiser, {size.budget:.3g} a cell"
    training = size.evaluations * cells
    share = training / (training + measuring)
    return f"{training:,} denoiser evaluations, {size.evaluations:,} a cell ({share:.0%} of all)"


def _pictures(plan: Plan, sets: dict[str, SampledSet]) -> int:
    """Pictures that every metric of their set looks at, in all."""
    base = base_pictures(plan, sets) * len(plan.guidances) + best_of_pictures(plan, sets)
    return base + cell_pictures(plan, sets) * len(plan.cells)


def _of_the_best(plan: Plan, sets: dict[str, SampledSet]) -> list[tuple[str, str]]:
    """What of measuring the cells their best checkpoints take, where these are kept."""
    each = best_evaluations(plan, sets)
    return [("with the best checkpoints", f"{each * len(plan.cells):,} of these at most")] if plan.keeps_best else []


def _on_the_device(plan: Plan, configs: dict[str, RunConfig], measuring: int) -> list[tuple[str, str]]:
    """Iterations, operations and memory, from the model's configuration files; why not, where these are not here."""
    first = configs[plan.entries[0]]
    try:
        peaks = {entry: make_plan(config, plan.processes).peak for entry, config in configs.items()}
        flops = skeleton_flops(first.model, first.lora)
    except UserError as error:
        return [("memory", f"cannot be told here: {error}")]
    largest = max(peaks, key=lambda entry: peaks[entry])
    planned = {entry: planned_training(config, plan.size, flops) for entry, config in configs.items()}
    training = sum(operations for _, operations in planned.values()) * len(plan.seeds)
    each = ", ".join(f"{entry} {count:,} ({operations:.3g})" for entry, (count, operations) in planned.items())
    return [
        ("iterations of a cell", f"{each}: at least, and their operations"),
        ("a backward", f"{flops.training / flops.forward - 1:.2f} of a forward's operations"),
        ("operations", f"{training + flops.forward * measuring:.3g} floating-point operations, measuring among them"),
        ("with --keep-pictures", keeping(plan)),
        ("memory", f"{peaks[largest] / GIB:.1f} GiB at most on each device ({largest}), metrics not counted"),
    ]


def planned_iterations(config: RunConfig, size: Size) -> int:
    """How many iterations a budget is enough for, each as dear as it can be.

    Raises:
        UserError: the budget is in operations, and the model is not there.
    """
    if size.flops is None:
        return int(size.budget // expected_cost(config).evaluations)
    return planned_training(config, size, skeleton_flops(config.model, config.lora))[0]


def planned_training(config: RunConfig, size: Size, flops: Flops) -> tuple[int, float]:
    """How many iterations a budget is enough for, each as dear as it can be, and their floating-point operations."""
    cost = expected_cost(config)
    count = int(size.budget // cost.spends(size, flops))
    return count, count * cost.operations(flops)
