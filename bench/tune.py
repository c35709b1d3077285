"""Settings searched for alike for every entry: random trials from written ranges, on validation prompts alone."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.folder_lock import only_process
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.contents import option_values

from .base import best_guidance, evaluator_of
from .budget import check_budget, cost_of
from .compare import check_task
from .contents import hold_to_contents
from .cost import count_flops
from .evaluate import Subject, headline
from .gather import TUNING_FILE, Tuning, read_tuning, search_ranges
from .plan import Event, Listener, Plan
from .preset import Range
from .prompt_sets import VALIDATION, sampled_sets
from .records import Trial, write_record
from .worker_process import Job
from .workers import run_jobs, start_workers

SEED = 100
"""Of every trial, so that trials differ by their settings; a comparison's own seeds are below it."""


def tune(plan: Plan, folder: Path, trials: int, listener: Listener) -> Tuning:
    """Do as many trials of every entry, and keep each in ``tuning.json`` as soon as it is done.

    What is drawn is written before the first trial; the same command goes on where it was stopped.

    Raises:
        UserError: the preset has no ranges, the folder holds another search, or as :func:`check_task`.
    """
    with only_process(folder):
        tuning = _begin(plan, folder, trials)
        check_task(plan)
        jobs = [
            Job("trial", t.entry, t.number) for t in tuning.trials if f"{t.entry}:{t.number}" not in tuning.finished
        ]

        def keep(job: Job, value: float | None, cost: int, reason: str = "") -> None:
            nonlocal tuning
            done = [
                trial.model_copy(update={"value": value, "denoiser_evaluations": cost})
                if (trial.entry, trial.number) == (job.entry, job.seed)
                else trial
                for trial in tuning.trials
            ]
            finished = [*tuning.finished, f"{job.entry}:{job.seed}"]
            tuning = tuning.model_copy(update={"trials": done, "finished": finished})
            write_record(tuning, folder / TUNING_FILE)
            shown = f"failed: {reason.strip().splitlines()[-1]}" if value is None else f"{value:.3f}"
            listener.listen(Event(f"{job.entry}-trial{job.seed}", 1.0, shown, evaluated=True))

        def died(job: Job, why: str) -> None:
            """Nothing is wrong with the trial: the same command does it again."""
            listener.listen(Event(f"{job.entry}-trial{job.seed}", 1.0, why, evaluated=True))

        if jobs:
            with start_workers(plan, folder, min(plan.jobs, len(jobs))) as workers:
                run_jobs(
                    workers,
                    jobs,
                    listener,
                    lambda job, done: keep(job, *done),
                    lambda job, why: keep(job, None, 0, why),
                    died,
                )
    return tuning


def run_trial(plan: Plan, folder: Path, entry: str, number: int, listener: Listener) -> tuple[float, int]:
    """Train one drawn setting for the budget, and measure it on the validation prompts at the guidance that suits it.

    Returns:
        The headline there, and the denoiser evaluations of training.
    """
    (trial,) = [t for t in read_tuning(folder / TUNING_FILE).trials if (t.entry, t.number) == (entry, number)]
    trainer = build_trainer(
        plan.preset.run_config(plan.task, entry, SEED, nested({**trial.settings, "training.guard": None}))
    )
    validation = {VALIDATION: sampled_sets(plan.task, plan.size)[VALIDATION]}
    hold_to_contents(folder, trainer, validation, entry, {f"the settings of {entry}": _undrawn(plan, trial)})
    evaluator = evaluator_of(plan, trainer, missing={}, sets=validation)
    costs, evaluations, flops = list[float](), 0, count_flops(trainer)

    def share() -> float:
        return min(1.0, sum(costs) / plan.size.budget)

    for record in trainer.iterations(share):
        costs.append(cost_of(record).spends(plan.size, flops))
        evaluations += int(record["denoiser_evaluations"])
        check_budget(plan.size, entry, record, flops)
        listener.listen(Event(f"{entry}-trial{number}", share(), "", evaluated=False))
        if sum(costs) + max(costs) > plan.size.budget:
            break
    with trainer.policy.with_weights(trainer.average_now()):
        best, rows = best_guidance(plan, evaluator, trainer.policy, Subject(entry, SEED, 1))
    metric, least = plan.task.headline_metric, plan.least_prompts(VALIDATION)
    return headline(rows.where(rows.guidance == best), validation[VALIDATION], metric, least), evaluations


def _undrawn(plan: Plan, trial: Trial) -> str:
    """SHA-256 of the settings that a trial has of its preset, which its folder's other trials have too."""
    config = plan.preset.run_config(plan.task, trial.entry, SEED, nested(trial.settings)).model_dump(mode="json")
    settings = sorted((key, value) for key, value in option_values(config) if key not in trial.settings)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def drawn(ranges: Mapping[str, Range], entry: str, number: int) -> dict[str, Any]:
    """The settings of one trial by dotted key; the same for the same entry and number, whatever else is drawn."""
    found: dict[str, Any] = {}
    for key, each in ranges.items():
        chance = random.Random(derive_seed(SEED, "trial", entry, number, key))  # noqa: S311  (no secret)
        if each.choices:
            found[key] = chance.choice(each.choices)
        else:
            assert each.low is not None
            assert each.high is not None
            low, high = (math.log(each.low), math.log(each.high)) if each.log else (each.low, each.high)
            value = chance.uniform(low, high)
            found[key] = float(f"{math.exp(value) if each.log else value:.4g}")
    return found


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as sections."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        place = sections
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return sections


def _begin(plan: Plan, folder: Path, trials: int) -> Tuning:
    """What is to be tried, written down now; what an earlier call found of it is kept, and more of the same is added.

    Raises:
        UserError: no ranges, or another search is there, or one that tried more.
    """
    search = plan.preset.search
    if not search:
        raise UserError(f"preset {plan.preset_name}: has no ranges to draw from; write them under search")
    settings = [
        Trial(
            entry=entry,
            number=number,
            settings=drawn({**search.get("shared", {}), **search.get(entry, {})}, entry, number),
            value=None,
            denoiser_evaluations=0,
        )
        for number in range(trials)
        for entry in plan.entries
    ]
    for trial in settings:  # a range may hold what a configuration refuses
        plan.preset.run_config(plan.task, trial.entry, SEED, nested(trial.settings))
    tuning = Tuning(
        preset=plan.preset_name,
        task=plan.task.name,
        task_version=plan.task.version,
        evaluations=plan.size.evaluations,
        flops=plan.size.flops,
        ranges=search_ranges(plan),
        trials=settings,
    )
    file = folder / TUNING_FILE
    if file.exists():
        tuning = _added(read_tuning(file), tuning, file)
    write_record(tuning, file)
    return tuning


def _added(before: Tuning, tuning: Tuning, file: Path) -> Tuning:
    """A search with what an earlier one that is a part of it has found.

    Raises:
        UserError: it is no part of it.
    """
    grows = {"ranges", "trials", "finished"}
    found = {(trial.entry, trial.number): trial for trial in before.trials}
    asked = {(trial.entry, trial.number): trial for trial in tuning.trials}
    is_part = (
        before.model_dump(exclude=grows) == tuning.model_dump(exclude=grows)
        and before.ranges.items() <= tuning.ranges.items()
        and all(key in asked and asked[key].settings == trial.settings for key, trial in found.items())
    )
    if not is_part:
        raise UserError(f"{file}: holds another search or a larger one; choose another --output, or remove it")
    return tuning.model_copy(update={"trials": [*{**asked, **found}.values()], "finished": before.finished})
