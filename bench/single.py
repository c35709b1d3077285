"""One run of a comparison: an (algorithm, seed) trained for the budget and evaluated on the schedule.

At every evaluation it is saved, so that a comparison that was killed goes on from the last one. The untrained base is
the same for all runs and is measured once, by :func:`measure_base`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.generate import decode_in_batches, fixed_noise, sample_latents
from dgpo_plugin.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from dgpo_plugin.training.run import ADAPTER_FILE, METRICS_FILE, restore_run, run_state, trim_metrics
from dgpo_plugin.training.trainer import Trainer

from .evaluate import PRIMARY, Evaluator, gallery_prompts, make_evaluator
from .plan import Event, Listener, Plan, base_file, run_file, run_folder
from .results import Evaluation, Guided, Run

PROGRESS_FILE = "progress.json"
ENDLESS = 10**9
"""Iterations: the budget ends a run, not their number."""


class Base(BaseModel):
    """The untrained base, and what the report shows pictures of.

    Attributes:
        guided: all metrics at every guidance of the preset, rising.
        tasks: task types of the held-out prompts.
    """

    model_config = ConfigDict(extra="forbid")

    guided: list[Guided]
    tasks: list[str]
    gallery_prompts: list[str]


class Progress(BaseModel):
    """How far a run is, beside its checkpoint: what it has spent, its costliest iteration, what was measured."""

    model_config = ConfigDict(extra="forbid")

    iteration: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    costliest: int = 0
    evaluations: list[Evaluation] = []


def run_config(plan: Plan, algorithm: str, seed: int) -> RunConfig:
    """The configuration of one run, ended by its budget alone."""
    config = plan.preset.run_config(algorithm, seed)
    return config.model_copy(update={"training": config.training.model_copy(update={"iterations": ENDLESS})})


def evaluator_of(plan: Plan, trainer: Trainer) -> Evaluator:
    """What the plan's runs are measured by."""
    batch_size = trainer.config.training.micro_batch_size or 256
    return make_evaluator(plan.preset.evaluation, plan.size, trainer.policy, batch_size)


def measure_base(plan: Plan, folder: Path) -> int:
    """Measure the untrained base at every guidance and write ``base.json`` and its pictures.

    Returns:
        Denoiser evaluations that it took.
    """
    trainer = Trainer(run_config(plan, plan.algorithms[0], plan.seeds[0]))
    evaluator = evaluator_of(plan, trainer)
    # Of an untrained LoRA the evaluation weights change nothing.
    guided = evaluator.measure_guided(trainer.policy, trainer.evaluation_weights, plan.base_guidances)
    prompts = _save_gallery(plan, trainer, evaluator, folder / "base.png")
    base = Base(guided=guided, tasks=evaluator.tasks, gallery_prompts=prompts)
    write_text_atomically(base_file(folder), base.model_dump_json(indent=1) + "\n")
    return sum(evaluator.evaluations(each.guidance) for each in guided)


def read_base(folder: Path) -> Base:
    """Raises UserError: ``base.json`` is missing or damaged."""
    try:
        return Base.model_validate_json(base_file(folder).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{base_file(folder)}: cannot be read; remove it and start the comparison again") from error


def run_one(plan: Plan, folder: Path, algorithm: str, seed: int, listener: Listener) -> None:
    """Train one (algorithm, seed) for the budget, evaluating on the schedule, and write its ``run.json``.

    Raises:
        UserError: the budget does not cover one iteration, or the base was not measured.
    """
    name, budget = f"{algorithm}-seed{seed}", plan.size.evaluations
    out, base = run_folder(folder, algorithm, seed), read_base(folder)
    trainer = Trainer(run_config(plan, algorithm, seed))
    evaluator = evaluator_of(plan, trainer)
    progress = _go_on(out, trainer) or _begin(plan, base)

    def share_done() -> float:
        return min(1.0, progress.denoiser_evaluations / budget)

    def evaluate() -> None:
        metrics = evaluator.measure(trainer.policy, trainer.evaluation_weights)
        progress.evaluations.append(_evaluation(progress, metrics))
        shown = f"held-out accuracy {metrics[PRIMARY]:.3f}, partial credit {metrics['partial_credit']:.3f}"
        listener.listen(Event(name, share_done(), shown, evaluated=True))

    due = [share * budget for share in plan.size.schedule]
    due = [at for at in due if at > progress.denoiser_evaluations]
    trim_metrics(out / METRICS_FILE, progress.iteration)
    with (out / METRICS_FILE).open("a", encoding="utf-8") as log:
        for record in trainer.iterations(share_done):
            _spend(progress, record)
            if progress.iteration == 1 and progress.denoiser_evaluations > budget:
                raise UserError(
                    f"--evaluations {budget}: one iteration of {algorithm} takes {progress.denoiser_evaluations}; "
                    f"give at least ten times that"
                )
            log.write(json.dumps(record) + "\n")
            log.flush()
            shown = f"iteration {progress.iteration}, reward {record['reward']:.3f}"
            listener.listen(Event(name, share_done(), shown, evaluated=False))
            # Stop where one more iteration, as costly as the costliest so far, would not fit into the budget.
            if progress.denoiser_evaluations + progress.costliest > budget:
                break
            if due and progress.denoiser_evaluations >= due[0]:
                due = [at for at in due if at > progress.denoiser_evaluations]
                evaluate()
                _keep(out, trainer, progress)
    evaluate()
    _finish(plan, folder, trainer, evaluator, progress, algorithm, seed)
    listener.listen(Event(name, 1.0, "done", evaluated=False))


def _begin(plan: Plan, base: Base) -> Progress:
    """A run at its start, where it is the base."""
    (metrics,) = [each.metrics for each in base.guided if each.guidance == plan.preset.evaluation.guidance]
    return Progress(evaluations=[_evaluation(Progress(), metrics)])


def _evaluation(progress: Progress, metrics: dict[str, float]) -> Evaluation:
    return Evaluation(
        iteration=progress.iteration,
        seconds=round(progress.seconds, 4),
        denoiser_evaluations=progress.denoiser_evaluations,
        metrics=metrics,
    )


def _spend(progress: Progress, record: dict[str, float]) -> None:
    """Count one iteration."""
    cost = int(record["denoiser_evaluations"])
    progress.iteration = int(record["iteration"])
    progress.seconds += record["seconds"]
    progress.denoiser_evaluations += cost
    progress.costliest = max(progress.costliest, cost)


def _finish(
    plan: Plan,
    folder: Path,
    trainer: Trainer,
    evaluator: Evaluator,
    progress: Progress,
    algorithm: str,
    seed: int,
) -> None:
    """Measure at every guidance, draw, export, and write ``run.json``, which says that the run is done."""
    out, evaluations = run_folder(folder, algorithm, seed), progress.evaluations
    guided = evaluator.measure_guided(
        trainer.policy, trainer.evaluation_weights, plan.adapter_guidances, evaluations[-1].metrics
    )
    with trainer.policy.with_weights(trainer.evaluation_weights):
        _save_gallery(plan, trainer, evaluator, out / "gallery.png")
    facts = TrainingFacts(
        trainer.config,
        trainer.steps,
        reward_before=_reward(evaluations[0]),
        reward_after=_reward(evaluations[-1]),
    )
    export_adapter(trainer.policy, trainer.evaluation_weights, out / ADAPTER_FILE, facts)
    run = Run(
        algorithm=algorithm,
        seed=seed,
        evaluations=evaluations,
        guided=guided,
        adapter=str((out / ADAPTER_FILE).relative_to(folder)),
    )
    write_text_atomically(run_file(folder, algorithm, seed), run.model_dump_json(indent=1) + "\n")
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    (out / PROGRESS_FILE).unlink(missing_ok=True)


def _save_gallery(plan: Plan, trainer: Trainer, evaluator: Evaluator, path: Path) -> list[str]:
    """A row of pictures with the weights that are in place; returns their prompts."""
    texts, setting = [prompt.text for prompt in gallery_prompts(evaluator)], plan.preset.evaluation
    noise = fixed_noise(trainer.model, range(len(texts)), 7)
    latents = sample_latents(
        trainer.model, texts, noise, setting.steps, setting.guidance, evaluator.batch_size, evaluator.encoded
    )
    pictures = decode_in_batches(trainer.model.decode, latents, evaluator.batch_size)
    with atomic_path(path) as temporary:
        image_grid(pictures, columns=len(texts), gap=4).save(temporary)
    return texts


def _keep(out: Path, trainer: Trainer, progress: Progress) -> None:
    """The checkpoint first: until the progress names it, the one before is gone on from."""
    save_checkpoint(out, run_state(trainer), trainer.state(), keep=2)
    write_text_atomically(out / PROGRESS_FILE, progress.model_dump_json() + "\n")


def _go_on(out: Path, trainer: Trainer) -> Progress | None:
    """What a killed run had at its last evaluation, with the trainer as it was; None if there is nothing."""
    try:
        progress = Progress.model_validate_json((out / PROGRESS_FILE).read_bytes())
        checkpoint = load_checkpoint(out / FOLDER / f"{progress.iteration:06d}")
    except (OSError, ValidationError, UserError):
        return None  # never written, or damaged: a run is short enough to be done again
    restore_run(trainer, checkpoint)
    return progress


def _reward(evaluation: Evaluation) -> float:
    """What was trained on, on the held-out pictures."""
    return (evaluation.metrics["accuracy"] + evaluation.metrics["partial_credit"]) / 2
