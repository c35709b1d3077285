"""How long a comparison will take on this machine: its challenger is timed, and the others taken to be as fast."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checks import prompt_sets
from dgpo_plugin.training.guard import guard_prompts

from .base import evaluator_of
from .budget import check_budget, check_budgets, cost_of
from .contents import hold_to_contents, hold_to_metrics
from .cost import count_flops
from .evaluate import Subject
from .plan import Forecast, Plan
from .prompt_sets import TEST, VALIDATION, SampledSet, sampled_sets
from .records import passes
from .size import BEST_OF

TIMED_ITERATIONS = 2
"""On a GPU, where the first one also loads what is computed with; one on a CPU."""
TIMED_PROMPTS = 4


@dataclass(frozen=True)
class Timing:
    """Seconds on this machine, with as many runs at once as the comparison has.

    Attributes:
        start: until a run's first iteration.
        training: per denoiser evaluation of training, rewards and decoding included.
        sampling: per denoiser evaluation of measuring, decoding and metrics included.
        evaluating: denoiser evaluations that measuring one cell takes, its guard's looks among them.
        flops: operations of a denoiser evaluation of training, forwards and backwards mixed as they are.
    """

    start: float
    training: float
    sampling: float
    evaluating: int
    flops: float = 0.0

    def evaluations(self, plan: Plan) -> float:
        """Denoiser evaluations of training that the budget is enough for."""
        return plan.size.budget if plan.size.flops is None else plan.size.flops / self.flops


def time_entry(plan: Plan, folder: Path, entry: str) -> Timing:
    """Train for an iteration or two and take the quicker, then measure a few of the test prompts.

    Raises:
        UserError: the budget does not cover the first iteration, or one of another entry; or what the comparison was
            begun with has changed, before anything is added to it.
    """
    started = time.perf_counter()
    config = plan.run_config(entry, plan.seeds[0])
    # Its guard would first measure the base, which is foretold from what measuring takes.
    trainer = build_trainer(config.model_copy(update={"training": config.training.model_copy(update={"guard": None})}))
    sets = sampled_sets(plan.task, plan.size)
    hold_to_contents(folder, trainer, sets)
    evaluator = evaluator_of(plan, trainer, missing=_no_optional(plan), sets=sets)
    hold_to_metrics(folder, evaluator)
    ready = time.perf_counter()
    timed = 1 if trainer.accelerator.device.type == "cpu" else TIMED_ITERATIONS
    records = list(itertools.islice(trainer.iterations(share_done=lambda: 0.0), timed))
    flops = count_flops(trainer)
    check_budget(plan.size, entry, records[0], flops)
    others = [other for other in plan.entries if other != entry]
    check_budgets(plan.size, {other: plan.run_config(other, plan.seeds[0]) for other in others}, flops)
    iterations = int(plan.size.budget // cost_of(records[0]).spends(plan.size, flops))
    few = range(min(TIMED_PROMPTS, len(sets[TEST].prompts)))
    trained = time.perf_counter()
    with trainer.policy.as_reference():
        rows = evaluator.measure(trainer.policy, Subject(), TEST, plan.guidance, prompts=few)
    spent = time.perf_counter() - trained
    return Timing(
        start=ready - started,
        training=min(record["seconds"] / record["denoiser_evaluations"] for record in records),
        sampling=spent / (len(rows) * passes(plan.task.sampling.steps, plan.guidance)),
        evaluating=cell_evaluations(plan, sets) + guard_evaluations(config, iterations),
        flops=cost_of(records[0]).operations(flops) / records[0]["denoiser_evaluations"],
    )


def _no_optional(plan: Plan) -> dict[str, str]:
    """Optional metrics are not timed."""
    return {name: "not timed" for name in plan.task.metric_names() if plan.task.metric(name).optional}


def cell_evaluations(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Denoiser evaluations of measuring one cell: its curve, every guidance on validation prompts, the rest at one."""
    validation, tested = pictures_of(sets)
    at_each = [passes(plan.task.sampling.steps, each) for each in plan.guidances]
    on_curve = curve_pictures(plan, sets) * passes(plan.task.sampling.steps, plan.guidance)
    return on_curve + validation * sum(at_each) + tested * max(at_each) + best_evaluations(plan, sets)


def cell_pictures(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Pictures of one cell that every metric of their set looks at."""
    validation, tested = pictures_of(sets)
    guidances, earlier = len(plan.guidances), earlier_checkpoints(plan)
    another = validation * (guidances - 1) + tested if earlier else 0
    return curve_pictures(plan, sets) + validation * (guidances + earlier) + tested + another


def best_evaluations(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Denoiser evaluations of a cell's best checkpoint at the most: validation prompts at every checkpoint, at the
    curves' guidance, and one that is not the last measured as that one is."""
    earlier = earlier_checkpoints(plan)
    if not earlier:
        return 0
    validation, tested = pictures_of(sets)
    at_each = [passes(plan.task.sampling.steps, each) for each in plan.guidances]
    on_curve = passes(plan.task.sampling.steps, plan.guidance)
    return validation * (earlier * on_curve + sum(at_each) - on_curve) + tested * max(at_each)


def earlier_checkpoints(plan: Plan) -> int:
    """Checkpoints before a cell's last that may turn out to be its best; none where the best is not asked for."""
    return len(plan.size.schedule) if plan.keeps_best else 0


def guard_pictures(config: RunConfig, iterations: int) -> int:
    """Pictures that the guard of a run of so many iterations draws and scores: the base's, then those of every look.

    Raises:
        UserError: a prompt set that is not there, or too few prompts for it.
    """
    setting = config.training.guard
    if setting is None:
        return 0
    sets = prompt_sets(config)
    prompts = guard_prompts(sets["prompts.train"], sets.get("prompts.held_out", sets["prompts.train"]), setting)
    return (1 + iterations // setting.every) * len(prompts) * setting.images


def guard_evaluations(config: RunConfig, iterations: int) -> int:
    """Denoiser evaluations of those pictures, which are outside the budget."""
    return guard_pictures(config, iterations) * passes(config.evaluation.steps, config.evaluation.guidance)


def base_evaluations(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Denoiser evaluations of measuring the base: everything at every guidance, and the best of N at the dearest."""
    at_each = [passes(plan.task.sampling.steps, each) for each in plan.guidances]
    return base_pictures(plan, sets) * sum(at_each) + best_of_pictures(plan, sets) * max(at_each)


def base_pictures(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Pictures of the base at each guidance: its validation prompts have more than a cell's where the size says so."""
    validation, (_, tested) = sets[VALIDATION], pictures_of(sets)
    return len(validation.prompts) * (plan.size.base_validation_images or validation.images) + tested


def curve_pictures(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Pictures of a cell's checkpoints, the last among them; a finished adapter has the last alone."""
    checkpoints = 1 if plan.adapters else len(plan.size.schedule) + 1
    return checkpoints * sum(len(each.curve) * each.images for each in sets.values())


def best_of_pictures(plan: Plan, sets: Mapping[str, SampledSet]) -> int:
    """Pictures of the base beyond every cell's, for the best of N."""
    return len(sets[TEST].prompts) * max(0, BEST_OF - sets[TEST].images) if plan.best_of_n else 0


def pictures_of(sets: Mapping[str, SampledSet]) -> tuple[int, int]:
    """Pictures of the validation set, and of all others together."""
    counts = {each.name: len(each.prompts) * each.images for each in sets.values()}
    validation = sum(counts[each.name] for each in sets.values() if each.role == "validation")
    return validation, sum(counts.values()) - validation


def forecast(plan: Plan, missing: list[tuple[str, int]], timing: Timing, *, base: bool = False) -> Forecast:
    """Forecast what the missing cells will take, from the timing of one algorithm.

    Args:
        missing: (entry, seed) of each, at least one.
        base: whether the base is still to be measured, beside the cells.
    """
    cell = timing.start + timing.training * timing.evaluations(plan) + timing.sampling * timing.evaluating
    seconds = len(missing) * cell
    if base:
        seconds += timing.start + timing.sampling * base_evaluations(plan, sampled_sets(plan.task, plan.size))
    return Forecast(
        runs=len(missing),
        seconds=seconds / min(plan.jobs, len(missing)),
        training=1000 * timing.training,
        sampling=1000 * timing.sampling,
    )
