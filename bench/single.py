"""One run of a comparison: an (algorithm, seed) trained for the budget and evaluated on the schedule.

At every evaluation it is saved, so that a comparison that was killed goes on from the last one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from dgpo_plugin.errors import UserError
from dgpo_plugin.export import export_adapter
from dgpo_plugin.files import atomic_path, write_text_atomically
from dgpo_plugin.run import ADAPTER_FILE, METRICS_FILE, restore_run, run_state, trim_metrics
from dgpo_plugin.sampling import decode_in_batches, fixed_noise, image_grid, sample_latents
from dgpo_plugin.trainer import Trainer

from .evaluate import PRIMARY, gallery_prompts, make_evaluator
from .plan import Event, Listener, Plan, run_file, run_folder
from .results import Evaluation, Run

PROGRESS_FILE = "progress.json"


class Progress(BaseModel):
    """How far a run is, beside its checkpoint: what it has spent, its dearest iteration, what was measured."""

    model_config = ConfigDict(extra="forbid")

    iteration: int = 0
    spent: dict[str, float] = {"seconds": 0.0, "evaluations": 0.0}
    dearest: float = 0.0
    evaluations: list[Evaluation] = []


def run_one(plan: Plan, folder: Path, algorithm: str, seed: int, listen: Listener) -> None:
    """Train one (algorithm, seed) for the budget, evaluating on the schedule, and write its ``run.json``."""
    name, budget = f"{algorithm}-seed{seed}", plan.budget
    config = plan.preset.run_config(algorithm, seed)
    # The budget ends the run, not a number of iterations.
    config = config.model_copy(update={"training": config.training.model_copy(update={"iterations": 10**9})})
    trainer = Trainer(config)
    evaluator = make_evaluator(plan.preset.evaluation, trainer.policy)
    out = run_folder(folder, algorithm, seed)
    progress = _go_on(out, trainer)
    evaluations, spent = progress.evaluations, progress.spent

    def evaluate(iteration: int) -> None:
        metrics = evaluator.measure(trainer.policy, trainer.evaluation_weights)
        evaluations.append(
            Evaluation(
                iteration=iteration,
                seconds=round(spent["seconds"], 4),
                denoiser_evaluations=int(spent["evaluations"]),
                metrics=metrics,
            )
        )
        shown = f"held-out accuracy {metrics[PRIMARY]:.3f}, partial credit {metrics['partial_credit']:.3f}"
        listen(Event(name, share_done(), shown, evaluated=True))

    def share_done() -> float:
        return min(1.0, spent[budget.kind] / budget.amount)

    if not evaluations:
        evaluate(0)
    due = [share * budget.amount for share in plan.preset.evaluation.schedule]
    due = [at for at in due if at > spent[budget.kind]]
    trim_metrics(out / METRICS_FILE, progress.iteration)
    iteration = progress.iteration
    with (out / METRICS_FILE).open("a", encoding="utf-8") as log:
        for record in trainer.iterations(share_done):
            iteration = int(record["iteration"])
            cost = {"seconds": record["seconds"], "evaluations": record["denoiser_evaluations"]}
            for kind in spent:
                spent[kind] += cost[kind]
            if spent[budget.kind] > budget.amount and iteration == 1:
                raise UserError(
                    f"--{'budget' if budget.kind == 'seconds' else 'evaluations'} {budget.amount:g}: one iteration of "
                    f"{algorithm} takes {cost[budget.kind]:.4g} {budget.kind}; give at least ten times that"
                )
            log.write(json.dumps(record) + "\n")
            log.flush()
            listen(Event(name, share_done(), f"iteration {iteration}, reward {record['reward']:.3f}", evaluated=False))
            # Stop where one more iteration, as dear as the dearest so far, would not fit into the budget.
            progress.dearest = max(progress.dearest, cost[budget.kind])
            if spent[budget.kind] + progress.dearest > budget.amount:
                break
            if due and spent[budget.kind] >= due[0]:
                due = [at for at in due if at > spent[budget.kind]]
                evaluate(iteration)
                progress.iteration = iteration
                _keep(out, trainer, progress)
    evaluate(iteration)
    prompts = gallery_prompts(evaluator)
    noise = fixed_noise(trainer.model, range(len(prompts)), 7)
    texts, setting = [p.text for p in prompts], plan.preset.evaluation

    def gallery() -> Any:
        latents = sample_latents(trainer.model, texts, noise, setting.steps, setting.guidance)
        return image_grid(decode_in_batches(trainer.model.decode, latents), columns=len(texts), gap=4)

    with trainer.policy.with_weights(trainer.evaluation_weights), atomic_path(out / "gallery.png") as temporary:
        gallery().save(temporary)
    with trainer.policy.as_reference(), atomic_path(out / "base.png") as temporary:
        gallery().save(temporary)
    export_adapter(
        trainer.policy,
        trainer.evaluation_weights,
        out / ADAPTER_FILE,
        config,
        steps=trainer.steps,
        reward_before=_reward(evaluations[0]),
        reward_after=_reward(evaluations[-1]),
    )
    run = Run(
        algorithm=algorithm, seed=seed, evaluations=evaluations, adapter=str((out / ADAPTER_FILE).relative_to(folder))
    )
    written = {"run": run.model_dump(), "gallery_prompts": texts, "tasks": evaluator.tasks}
    write_text_atomically(run_file(folder, algorithm, seed), json.dumps(written, indent=1) + "\n")
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    (out / PROGRESS_FILE).unlink(missing_ok=True)


def _keep(out: Path, trainer: Trainer, progress: Progress) -> None:
    """The checkpoint first: until the progress names it, the one before is gone on from."""
    save_checkpoint(out, run_state(trainer), trainer.state(), keep=2)
    write_text_atomically(out / PROGRESS_FILE, progress.model_dump_json() + "\n")


def _go_on(out: Path, trainer: Trainer) -> Progress:
    """What a killed run had at its last evaluation, with the trainer as it was; the beginning if there is nothing."""
    try:
        progress = Progress.model_validate_json((out / PROGRESS_FILE).read_bytes())
        checkpoint = load_checkpoint(out / FOLDER / f"{progress.iteration:06d}")
    except (OSError, ValidationError, UserError):
        return Progress()  # never written, or damaged: a run is short enough to be done again
    restore_run(trainer, checkpoint)
    return progress


def _reward(evaluation: Evaluation) -> float:
    """What was trained on, on the held-out pictures."""
    return (evaluation.metrics["accuracy"] + evaluation.metrics["partial_credit"]) / 2
