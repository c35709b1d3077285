"""A cell of a comparison: one entry with one seed, trained for the budget and evaluated on the schedule.

At every evaluation it is saved, so that a comparison that was killed goes on from the last one. The untrained base is
the same for all cells and is measured once (:mod:`dgpo_bench.base`).
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dgpo_plugin.adapters.save import TrainingFacts, changes_nothing, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.folder_lock import HeldFolder
from dgpo_plugin.common.public_names import without_folders
from dgpo_plugin.distributed.device import runs_on_cpu
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from dgpo_plugin.training.checkpoint import Checkpoint as RunCheckpoint
from dgpo_plugin.training.guard import guard_lines
from dgpo_plugin.training.identity import check_same_run
from dgpo_plugin.training.run import identity_of, progress_of, restore_run
from dgpo_plugin.training.run_folder import RunFolder, trim_metrics
from dgpo_plugin.training.trainer import Trainer

from .base import (
    BaseRecord,
    base_pictures_file,
    best_guidance,
    evaluator_of,
    least_prompts,
    only_main,
    read_base,
    write_gallery,
)
from .budget import check_budget, cost_of
from .cost import count_flops, parts_of
from .evaluate import Evaluator, Subject, headline
from .gpu.flops import Flops
from .pictures import PICTURES_FILE, Pictures, join, read_pictures, write_pictures
from .plan import Event, Listener, Plan, cell_file, kept_folder, run_folder
from .preset import Size
from .prompt_sets import TEST
from .records import BASE, CellRecord, Checkpoint, read_record, write_record
from .throughput import peak_bytes

PROGRESS_FILE = "progress.json"
START = Checkpoint(iteration=0, steps=0, denoiser_evaluations=0, flops=0.0, images_scored=0, seconds={}, drift=0.0)
"""A cell's first checkpoint: the untrained base."""


class Progress(BaseModel):
    """How far a cell is, kept beside its checkpoint: what it has spent, and where it was measured."""

    model_config = ConfigDict(extra="forbid")

    iteration: int = 0
    seconds: dict[str, float] = {}
    denoiser_evaluations: int = 0
    flops: float = 0.0
    images_scored: int = 0
    costliest: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoints: list[Checkpoint] = [START]

    def spent(self, size: Size) -> float:
        """How much of a size's budget is spent, in its unit."""
        return self.denoiser_evaluations if size.flops is None else self.flops

    def count(self, record: dict[str, float], images: int, size: Size, flops: Flops) -> None:
        """Add what one iteration cost, from its line of ``metrics.jsonl``."""
        cost = cost_of(record)
        self.iteration = int(record["iteration"])
        for part, seconds in parts_of(record).items():
            self.seconds[part] = round(self.seconds.get(part, 0.0) + seconds, 4)
        self.denoiser_evaluations += int(cost.evaluations)
        self.images_scored += images
        self.costliest = max(self.costliest, cost.spends(size, flops))
        self.flops += cost.operations(flops)


@dataclass
class Cell:
    """One cell under way.

    Attributes:
        comparison: the comparison's folder.
        flops: of one image's passes.
        pictures: measured so far.
        held: the run's folder, in the first of its processes, which alone writes; None in the others.
    """

    plan: Plan
    comparison: Path
    entry: str
    seed: int
    listener: Listener
    trainer: Trainer
    evaluator: Evaluator
    flops: Flops
    progress: Progress
    pictures: list[Pictures]
    held: HeldFolder | None

    @property
    def folder(self) -> Path:
        """Where the cell lies."""
        return run_folder(self.comparison, self.entry, self.seed)

    @property
    def processes(self) -> Processes:
        """That train it together."""
        return self.trainer.processes

    def check_folder(self) -> None:
        """Find out that the folder is still there, in the process that writes to it.

        Raises:
            UserError: it is not.
        """
        if self.held is not None:
            self.held.check()

    @property
    def subject(self) -> Subject:
        """Whose pictures its last checkpoint's are."""
        return Subject(self.entry, self.seed, len(self.progress.checkpoints) - 1)

    def share_done(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        return min(1.0, self.progress.spent(self.plan.size) / self.plan.size.budget)

    def tell(self, text: str, *, share: float | None = None, evaluated: bool = False) -> None:
        """Have the listener show how far the cell is; ``share`` in the place of the budget's."""
        name = f"{self.entry}-seed{self.seed}"
        self.listener.listen(Event(name, self.share_done() if share is None else share, text, evaluated))


def run_cell(plan: Plan, folder: Path, entry: str, seed: int, listener: Listener) -> None:
    """Train one (entry, seed) for the budget, evaluating on the schedule, and write its ``cell.json``.

    Args:
        folder: the comparison's.

    Raises:
        UserError: the budget does not cover one iteration, the base was not measured, a metric fails, ...
    """
    processes = join_processes(plan.run_config(entry, seed).training.process_timeout)
    with only_main(run_folder(folder, entry, seed), processes) as held:
        cell = _open_cell(plan, folder, entry, seed, listener, held)
        _train(cell)
        _evaluate(cell)
        _finish(cell)
        cell.tell("done", share=1.0)


def read_cell(file: Path) -> CellRecord:
    """A finished or failed cell.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_record(CellRecord, file, "not a finished cell; remove it, and the same command does that cell again")


def write_failed(folder: Path, entry: str, seed: int, reason: str, *, died: bool = False) -> None:
    """Write down that a cell failed and why; what it has saved stays, for it to be tried again."""
    record = CellRecord(entry=entry, seed=seed, status="failed", reason=reason, died=died)
    write_record(record, cell_file(folder, entry, seed))


# ---- the run, in order


def _open_cell(plan: Plan, folder: Path, entry: str, seed: int, listener: Listener, held: HeldFolder | None) -> Cell:
    """The cell as it was at its last evaluation, or at its start."""
    base = read_base(folder)
    trainer = build_trainer(plan.run_config(entry, seed))
    evaluator = evaluator_of(plan, trainer, missing=missing_metrics(base), kept=kept_folder(plan, folder))
    flops = count_flops(trainer)
    progress, pictures = _restore(run_folder(folder, entry, seed), trainer) or (Progress(), [])
    return Cell(plan, folder, entry, seed, listener, trainer, evaluator, flops, progress, pictures, held)


def missing_metrics(base: BaseRecord) -> dict[str, str]:
    """Why optional metrics were missing when the base was measured, by name."""
    return {name: metric.missing for name, metric in base.metrics.items() if metric.missing}


def _restore(folder: Path, trainer: Trainer) -> tuple[Progress, list[Pictures]] | None:
    """Put the trainer where a killed cell was at its last evaluation; None where there is nothing to go on from.

    Raises:
        UserError: it was of another base, or of other prompts, rewards or settings.
    """
    saved = _saved(folder)
    if not trainer.processes.decided_by_main(lambda: saved is not None):
        return None
    trainer.processes.fail_together(None if saved else f"{folder}: one process can read it and another cannot")
    assert saved is not None
    progress, checkpoint, pictures = saved
    check_same_run(checkpoint.identity, identity_of(trainer), checkpoint.path, progress.iteration)
    restore_run(trainer, checkpoint)
    # The pictures are written first: those of an evaluation that the progress does not know are of a later one.
    return progress, [pictures.where(pictures.checkpoint < len(progress.checkpoints))]


def _saved(folder: Path) -> tuple[Progress, RunCheckpoint, Pictures] | None:
    """What a cell's folder has of its last evaluation."""
    try:
        progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
        checkpoint = load_checkpoint(folder / FOLDER / f"{progress.iteration:06d}")
        return progress, checkpoint, read_pictures(folder / PICTURES_FILE)
    except (OSError, ValidationError, UserError):
        return None  # never written, or damaged: a cell is short enough to be done again


def _train(cell: Cell) -> None:
    """Train until the budget is spent, evaluating and saving wherever the schedule says."""
    progress, size = cell.progress, cell.plan.size
    due = [share * size.budget for share in size.schedule if share * size.budget > progress.spent(size)]
    images = cell.trainer.config.training.images
    with contextlib.ExitStack() as stack:
        log: TextIO | None = None
        if cell.processes.is_main:
            trim_metrics(RunFolder(cell.folder).metrics, progress.iteration)
            log = stack.enter_context(RunFolder(cell.folder).metrics.open("a", encoding="utf-8"))
        for record in cell.trainer.iterations(cell.share_done):
            progress.count(record, images, size, cell.flops)
            check_budget(size, cell.entry, record, cell.flops)
            if log is not None:
                log.write(json.dumps(record) + "\n")
                log.flush()
            progress.evaluation_seconds += record.get("guard_seconds", 0.0)
            said = guard_lines(cell.trainer.guard, progress.iteration)
            cell.tell(f"iteration {progress.iteration}, reward {record['reward']:.3f}{''.join(said)}")
            # Stop where one more iteration, as costly as the costliest so far, would not fit into the budget.
            if progress.spent(size) + progress.costliest > size.budget:
                return
            if due and progress.spent(size) >= due[0]:
                due = [at for at in due if at > progress.spent(size)]
                _evaluate(cell)
                _save(cell)


def _evaluate(cell: Cell) -> None:
    """Measure the averaged adapter as it is now and draw the report's pictures, outside the budget."""
    started, progress, policy = time.perf_counter(), cell.progress, cell.trainer.policy
    with policy.with_weights(cell.trainer.average_now()):
        drift = cell.evaluator.drift(policy)
        checkpoint = Checkpoint(
            iteration=progress.iteration,
            steps=cell.trainer.steps,
            denoiser_evaluations=progress.denoiser_evaluations,
            flops=progress.flops,
            images_scored=progress.images_scored,
            seconds=dict(progress.seconds),
            drift=drift,
        )
        progress.checkpoints = [*progress.checkpoints, checkpoint]
        rows = cell.evaluator.curve(policy, cell.subject, cell.plan.guidance)
        file = gallery_file(cell.folder, cell.subject.checkpoint)
        save_gallery(cell.evaluator, policy, cell.plan.guidance, file)
    cell.pictures.append(rows)
    progress.evaluation_seconds += time.perf_counter() - started
    metric, test = cell.plan.task.headline_metric, cell.evaluator.sets[TEST]
    value = headline(_of_set(rows, TEST), test, metric, least_prompts(cell.plan, TEST))
    cell.tell(f"{cell.evaluator.measures[metric].record.label} {value:.3f}, drift {drift:.2g}", evaluated=True)


def _of_set(rows: Pictures, name: str) -> Pictures:
    return rows.where(rows.set == name)


def _save(cell: Cell) -> None:
    """Save pictures and checkpoint first: until the progress names them, those before are gone on from."""
    trainer = cell.trainer
    cell.pictures = [join(cell.pictures)]
    identity, state = identity_of(trainer), trainer.state()

    def write() -> None:
        cell.check_folder()
        write_pictures(cell.pictures[0], cell.folder / PICTURES_FILE)
        save_checkpoint(cell.folder, identity, progress_of(trainer), state, keep=2)
        write_text_atomically(cell.folder / PROGRESS_FILE, cell.progress.model_dump_json() + "\n")

    cell.processes.on_main(write)


def _finish(cell: Cell) -> None:
    """Choose the guidance, measure at it, export, and write ``cell.json``, which says that the cell is done."""
    trainer, plan, started = cell.trainer, cell.plan, time.perf_counter()
    weights, subject, policy = trainer.average_now(), cell.subject, trainer.policy
    with policy.with_weights(weights):
        best, rows = best_guidance(plan, cell.evaluator, policy, subject)
        cell.pictures += [rows, cell.evaluator.finished(policy, subject, best, plan.guidance)]
    if changes_nothing(weights):
        cell.tell("the adapter is all zeros and changes nothing: no update did anything", share=1.0)
    peak = largest_peak(cell.processes, policy.device)
    seconds = cell.progress.evaluation_seconds + time.perf_counter() - started
    cell.processes.on_main(lambda: _write_finished(cell, weights, best, peak, seconds))


def _write_finished(cell: Cell, weights: dict[str, Tensor], guidance: float, peak: int, seconds: float) -> None:
    """Write the adapter, the pictures' table and, last, ``cell.json``; what it could have gone on from is removed."""
    cell.check_folder()
    adapter = RunFolder(cell.folder).adapter
    export_adapter(cell.trainer.policy, weights, adapter, _facts(cell))
    write_pictures(join(cell.pictures), cell.folder / PICTURES_FILE)
    record = CellRecord(
        entry=cell.entry,
        seed=cell.seed,
        status="done",
        checkpoints=cell.progress.checkpoints,
        guidance=guidance,
        processes=cell.processes.count,
        peak_memory=peak,
        evaluation_seconds=round(seconds, 4),
        adapter=adapter.relative_to(cell.comparison).as_posix(),
        alarms=[] if (guard := cell.trainer.guard) is None else without_folders(map(str, guard.state.alarms)),
    )
    write_record(record, cell_file(cell.comparison, cell.entry, cell.seed))
    shutil.rmtree(cell.folder / FOLDER, ignore_errors=True)
    (cell.folder / PROGRESS_FILE).unlink(missing_ok=True)


def largest_peak(processes: Processes, device: torch.device) -> int:
    """Bytes of memory at the most, on the process that had most."""
    own = peak_bytes(runs_on_cpu())
    return own if processes.count == 1 else int(processes.largest(torch.tensor(own, device=device)))


def _facts(cell: Cell) -> TrainingFacts:
    """What the adapter's card says: the training reward on the curve's test prompts, of the base and of the adapter."""
    trainer, plan, test = cell.trainer, cell.plan, cell.evaluator.sets[TEST]
    rows = join([read_pictures(base_pictures_file(cell.comparison)), *cell.pictures])
    before, after = (
        _training_reward(plan, rows.where(np.isin(rows.prompt, test.curve) & chosen & (rows.image < test.images)))
        for chosen in (
            (rows.entry == BASE) & (rows.set == TEST) & (rows.guidance == plan.guidance),
            (rows.checkpoint == cell.subject.checkpoint) & (rows.set == TEST) & (rows.guidance == plan.guidance),
        )
    )
    return TrainingFacts(
        trainer.config,
        trainer.exported_steps,
        reward_before=before,
        reward_after=after,
        measured_on="test prompts",
        guard="" if trainer.guard is None else trainer.guard.told,
    )


def _training_reward(plan: Plan, rows: Pictures) -> float | None:
    """The weighted sum of what is trained on; None where a part of it is not measured."""
    parts = [
        term.weight * float(rows.metrics[label].mean())
        for label, term in plan.task.rewards.items()
        if label in rows.metrics and plan.task.metric(label).reward == term.name(label)
    ]
    total = sum(parts)
    return total if len(parts) == len(plan.task.rewards) and math.isfinite(total) else None


def gallery_file(folder: Path, checkpoint: int) -> Path:
    """Where a checkpoint's pictures for the report lie, in a cell's folder."""
    return folder / f"gallery-{checkpoint}.png"


def save_gallery(evaluator: Evaluator, policy: Policy, guidance: float, path: Path) -> None:
    """Draw the report's prompts in a row, with the weights that are in place."""
    pictures = evaluator.gallery(policy, guidance)
    evaluator.processes.on_main(lambda: write_gallery(pictures, path))
