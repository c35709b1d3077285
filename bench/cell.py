"""A cell of a comparison: one algorithm with one seed, trained for the budget and evaluated on the schedule.

At every evaluation it is saved, so that a comparison that was killed goes on from the last one. The untrained base is
the same for all cells and is measured once, by :func:`measure_base`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.adapters.save import TrainingFacts, changes_nothing, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.folder_lock import HeldFolder, only_process
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.models.generate import BATCH_SIZE, fixed_noise, generate
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from dgpo_plugin.training.evaluation import trained_on
from dgpo_plugin.training.identity import check_same_run
from dgpo_plugin.training.run import identity_of, progress_of, restore_run
from dgpo_plugin.training.run_folder import RunFolder, trim_metrics
from dgpo_plugin.training.trainer import Trainer

from .evaluate import Evaluator, gallery_prompts, make_evaluator
from .metrics import PRIMARY, training_reward
from .plan import Event, Listener, Plan, base_file, run_file, run_folder
from .results import Base, Evaluation, Run, read_base

PROGRESS_FILE = "progress.json"
GALLERY_SEED = 7
"""Seed of the noise that the report's pictures start from."""


class Progress(BaseModel):
    """How far a run is, kept beside its checkpoint: what it has spent, its costliest iteration, what was measured."""

    model_config = ConfigDict(extra="forbid")

    iteration: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    costliest: int = 0
    evaluations: list[Evaluation] = []

    def count(self, record: dict[str, float]) -> None:
        """Add what one iteration cost, from its line of ``metrics.jsonl``."""
        cost = int(record["denoiser_evaluations"])
        self.iteration = int(record["iteration"])
        self.seconds += record["seconds"]
        self.denoiser_evaluations += cost
        self.costliest = max(self.costliest, cost)

    def note(self, metrics: dict[str, float]) -> None:
        """Keep an evaluation that was done at this point."""
        self.evaluations.append(
            Evaluation(
                iteration=self.iteration,
                seconds=round(self.seconds, 4),
                denoiser_evaluations=self.denoiser_evaluations,
                metrics=metrics,
            )
        )


@dataclass
class Cell:
    """One run under way.

    Attributes:
        comparison: the comparison's folder.
        held: the run's.
    """

    plan: Plan
    comparison: Path
    algorithm: str
    seed: int
    listener: Listener
    trainer: Trainer
    evaluator: Evaluator
    progress: Progress
    held: HeldFolder

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return run_folder(self.comparison, self.algorithm, self.seed)

    @property
    def budget(self) -> int:
        """Denoiser evaluations of training that the run may spend."""
        return self.plan.size.evaluations

    def share_done(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        return min(1.0, self.progress.denoiser_evaluations / self.budget)

    def tell(self, text: str, *, share: float | None = None, evaluated: bool = False) -> None:
        """Have the listener show how far the run is; ``share`` in the place of the budget's."""
        name = f"{self.algorithm}-seed{self.seed}"
        self.listener.listen(Event(name, self.share_done() if share is None else share, text, evaluated))


def run_cell(plan: Plan, folder: Path, algorithm: str, seed: int, listener: Listener) -> None:
    """Train one (algorithm, seed) for the budget, evaluating on the schedule, and write its ``run.json``.

    Args:
        folder: the comparison's.

    Raises:
        UserError: the budget does not cover one iteration, or the base was not measured.
    """
    with only_process(run_folder(folder, algorithm, seed)) as held:
        cell = _open_cell(plan, folder, algorithm, seed, listener, held)
        _train(cell)
        _evaluate(cell)
        _finish(cell)
        cell.tell("done", share=1.0)


def measure_base(plan: Plan, folder: Path) -> int:
    """Measure the untrained base at every guidance and write ``base.json`` and its pictures.

    Returns:
        Denoiser evaluations that it took.
    """
    trainer = new_trainer(plan, plan.algorithms[0], plan.seeds[0])
    evaluator = evaluator_of(plan, trainer)
    # Of an untrained LoRA the evaluation weights change nothing.
    guided = evaluator.measure_guided(trainer.policy, trainer.evaluation_weights, plan.base_guidances, {})
    _save_gallery(trainer, evaluator, folder / "base.png")
    prompts = [prompt.text for prompt in gallery_prompts(evaluator)]
    base = Base(guided=guided, tasks=evaluator.tasks, gallery_prompts=prompts)
    write_text_atomically(base_file(folder), base.model_dump_json(indent=1) + "\n")
    return sum(evaluator.evaluations(each.guidance) for each in guided)


def new_trainer(plan: Plan, algorithm: str, seed: int) -> Trainer:
    """The trainer of one run of a plan."""
    return build_trainer(plan.preset.run_config(algorithm, seed))


def evaluator_of(plan: Plan, trainer: Trainer) -> Evaluator:
    """The evaluator that measures all runs of a plan alike.

    Raises:
        UserError: prompts that are to be held out are trained on.
    """
    name = plan.preset.evaluation.held_out
    held_out = load_prompts(name)
    if seen := trained_on(trainer.groups.prompts, held_out):
        raise UserError(
            f"evaluation.held_out {name}: {len(seen)} of {len(held_out)} prompts are in prompts.train too (first: "
            f"{seen[0].text!r}); name a set that is not trained on"
        )
    batch_size = trainer.config.training.micro_batch_size or BATCH_SIZE
    return make_evaluator(plan.preset.evaluation, plan.size, trainer.policy, batch_size)


# ---- the run, in order


def _open_cell(plan: Plan, folder: Path, algorithm: str, seed: int, listener: Listener, held: HeldFolder) -> Cell:
    """The run as it was at its last evaluation, or at its start."""
    base = read_base(base_file(folder))
    trainer = new_trainer(plan, algorithm, seed)
    evaluator = evaluator_of(plan, trainer)
    progress = _restore(run_folder(folder, algorithm, seed), trainer) or _progress_at_base(plan, base)
    return Cell(plan, folder, algorithm, seed, listener, trainer, evaluator, progress, held)


def _restore(folder: Path, trainer: Trainer) -> Progress | None:
    """Put the trainer where a killed run was at its last evaluation; None where there is nothing to go on from.

    Raises:
        UserError: it was of another base, or of other prompts, rewards or settings.
    """
    try:
        progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
        checkpoint = load_checkpoint(folder / FOLDER / f"{progress.iteration:06d}")
    except (OSError, ValidationError, UserError):
        return None  # never written, or damaged: a run is short enough to be done again
    check_same_run(checkpoint.identity, identity_of(trainer), checkpoint.path, progress.iteration)
    restore_run(trainer, checkpoint)
    return progress


def _progress_at_base(plan: Plan, base: Base) -> Progress:
    """A run's progress at its start, where it is the base."""
    (metrics,) = [each.metrics for each in base.guided if each.guidance == plan.preset.evaluation.guidance]
    progress = Progress()
    progress.note(metrics)
    return progress


def _train(cell: Cell) -> None:
    """Train until the budget is spent, evaluating and saving wherever the schedule says."""
    progress, budget = cell.progress, cell.budget
    due = [share * budget for share in cell.plan.size.schedule if share * budget > progress.denoiser_evaluations]
    file = RunFolder(cell.folder).metrics
    trim_metrics(file, progress.iteration)
    with file.open("a", encoding="utf-8") as log:
        for record in cell.trainer.iterations(cell.share_done):
            progress.count(record)
            _check_budget(cell)
            log.write(json.dumps(record) + "\n")
            log.flush()
            cell.tell(f"iteration {progress.iteration}, reward {record['reward']:.3f}")
            # Stop where one more iteration, as costly as the costliest so far, would not fit into the budget.
            if progress.denoiser_evaluations + progress.costliest > budget:
                return
            if due and progress.denoiser_evaluations >= due[0]:
                due = [at for at in due if at > progress.denoiser_evaluations]
                _evaluate(cell)
                _save(cell)


def _check_budget(cell: Cell) -> None:
    """Refuse a budget that the first iteration is too much for."""
    spent = cell.progress.denoiser_evaluations
    if cell.progress.iteration == 1 and spent > cell.budget:
        raise UserError(
            f"--evaluations {cell.budget}: one iteration of {cell.algorithm} takes {spent}; "
            f"give at least ten times that"
        )


def _evaluate(cell: Cell) -> None:
    """Measure the averaged adapter as it is now, outside the budget."""
    metrics = cell.evaluator.measure(cell.trainer.policy, cell.trainer.average_now())
    cell.progress.note(metrics)
    shown = f"held-out accuracy {metrics[PRIMARY]:.3f}, partial credit {metrics['partial_credit']:.3f}"
    cell.tell(shown, evaluated=True)


def _save(cell: Cell) -> None:
    """Save the checkpoint first: until the progress names it, the one before is gone on from."""
    trainer = cell.trainer
    cell.held.check()
    save_checkpoint(cell.folder, identity_of(trainer), progress_of(trainer), trainer.state(), keep=2)
    write_text_atomically(cell.folder / PROGRESS_FILE, cell.progress.model_dump_json() + "\n")


def _finish(cell: Cell) -> None:
    """Measure at every guidance, draw, export, and write ``run.json``, which says that the run is done."""
    trainer, evaluations = cell.trainer, cell.progress.evaluations
    weights = trainer.average_now()
    first, last = evaluations[0].metrics, evaluations[-1].metrics
    guided = cell.evaluator.measure_guided(
        trainer.policy,
        weights,
        cell.plan.adapter_guidances,
        {cell.plan.preset.evaluation.guidance: last},
    )
    with trainer.policy.with_weights(weights):
        _save_gallery(trainer, cell.evaluator, cell.folder / "gallery.png")
    adapter = RunFolder(cell.folder).adapter
    facts = TrainingFacts(
        trainer.config, trainer.steps, reward_before=training_reward(first), reward_after=training_reward(last)
    )
    cell.held.check()
    if changes_nothing(weights):
        cell.tell("the adapter is all zeros and changes nothing: no update did anything", share=1.0)
    export_adapter(trainer.policy, weights, adapter, facts)
    run = Run(
        algorithm=cell.algorithm,
        seed=cell.seed,
        evaluations=evaluations,
        guided=guided,
        adapter=str(adapter.relative_to(cell.comparison)),
    )
    file = run_file(cell.comparison, cell.algorithm, cell.seed)
    write_text_atomically(file, run.model_dump_json(indent=1) + "\n")
    shutil.rmtree(cell.folder / FOLDER, ignore_errors=True)
    (cell.folder / PROGRESS_FILE).unlink(missing_ok=True)


def _save_gallery(trainer: Trainer, evaluator: Evaluator, path: Path) -> None:
    """Draw the report's prompts in a row, with the weights that are in place."""
    texts, setting = [prompt.text for prompt in gallery_prompts(evaluator)], evaluator.plan
    noise = fixed_noise(trainer.model, range(len(texts)), GALLERY_SEED)
    pictures = generate(
        trainer.model, texts, noise, setting.steps, setting.guidance, evaluator.batch_size, evaluator.encoded
    )
    with atomic_path(path) as temporary:
        image_grid(pictures, columns=len(texts), gap=4).save(temporary)
