"""A cell of a comparison: one entry with one seed, trained for the budget and evaluated on the schedule.

At every evaluation it is saved, so that a comparison that was killed goes on from the last one. The untrained base is
the same for all cells and is measured once (:mod:`dgpo_bench.base`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dgpo_plugin.adapters.save import changes_nothing, export_adapter
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

from .base import best_checkpoint, best_guidance, evaluator_of, only_main, write_gallery
from .budget import check_budget, cost_of
from .cell_adapters import best_adapter_file, facts, forget_best, read_best, write_best
from .commit import git_hash
from .contents import hold_to_contents, hold_to_metrics
from .cost import count_flops, parts_of
from .evaluate import Evaluator, Subject, headline
from .gpu.flops import Flops
from .pictures import PICTURES_FILE, Pictures, join, read_pictures, write_pictures
from .plan import Event, Listener, Plan, base_file, cell_file, kept_folder, run_folder
from .prompt_sets import TEST, VALIDATION
from .records import BestCheckpoint, CellRecord, Checkpoint, write_record
from .size import Size
from .throughput import peak_bytes
from .written import base_pictures_file, gallery_file, missing_metrics, wait_for

PROGRESS_FILE = "progress.json"
START = Checkpoint(iteration=0, steps=0, denoiser_evaluations=0, flops=0.0, images_scored=0, seconds={}, drift=0.0)
"""A cell's first checkpoint: the untrained base."""


class Progress(BaseModel):
    """How far a cell is, kept beside its checkpoint: what it has spent, where it was measured, and where best."""

    model_config = ConfigDict(extra="forbid")

    iteration: int = 0
    seconds: dict[str, float] = {}
    denoiser_evaluations: int = 0
    flops: float = 0.0
    images_scored: int = 0
    costliest: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoints: list[Checkpoint] = [START]
    best: int = 0

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
        best: the weights of its best checkpoint; none where that is not asked for.
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
    best: dict[str, Tensor] = field(default_factory=dict)

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
        UserError: the budget does not cover one iteration, no metric was tried yet, one fails, ...
    """
    processes = join_processes(plan.run_config(entry, seed).training.process_timeout)
    with only_main(run_folder(folder, entry, seed), processes) as held:
        cell = _open_cell(plan, folder, entry, seed, listener, held)
        _train(cell)
        _evaluate(cell)
        _finish(cell)
        cell.tell("done", share=1.0)


# ---- the run, in order


def _open_cell(plan: Plan, folder: Path, entry: str, seed: int, listener: Listener, held: HeldFolder | None) -> Cell:
    """The cell as it was at its last evaluation, or at its start."""
    trainer = build_trainer(plan.run_config(entry, seed))
    started = time.perf_counter()
    evaluator = evaluator_of(plan, trainer, missing=missing_metrics(folder), kept=kept_folder(plan, folder))
    hold_to_contents(folder, trainer, evaluator.sets, entry)
    hold_to_metrics(folder, evaluator)
    spent = time.perf_counter() - started  # on texts, and on the pictures that drift is measured on
    flops = count_flops(trainer)
    progress, pictures, best = _restore(run_folder(folder, entry, seed), trainer) or (Progress(), [], {})
    progress.evaluation_seconds += spent
    return Cell(plan, folder, entry, seed, listener, trainer, evaluator, flops, progress, pictures, held, best)


def _restore(folder: Path, trainer: Trainer) -> tuple[Progress, list[Pictures], dict[str, Tensor]] | None:
    """Put the trainer where a killed cell was at its last evaluation; None where there is nothing to go on from.

    Raises:
        UserError: it was of another base, or of other prompts, rewards or settings.
    """
    saved = _saved(folder)
    if not trainer.processes.decided_by_main(lambda: saved is not None):
        return None
    trainer.processes.fail_together(None if saved else f"{folder}: one process can read it and another cannot")
    assert saved is not None
    progress, checkpoint, pictures, best = saved
    check_same_run(checkpoint.identity, identity_of(trainer), checkpoint.path, progress.iteration)
    restore_run(trainer, checkpoint)
    # The pictures are written first: those of an evaluation that the progress does not know are of a later one.
    weights = {name: tensor.to(trainer.policy.device) for name, tensor in best.items()}
    return progress, [pictures.where(pictures.checkpoint < len(progress.checkpoints))], weights


def _saved(folder: Path) -> tuple[Progress, RunCheckpoint, Pictures, dict[str, Tensor]] | None:
    """What a cell's folder has of its last evaluation."""
    try:
        progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
        checkpoint = load_checkpoint(folder / FOLDER / f"{progress.iteration:06d}")
        best = read_best(folder, progress.best) if progress.best else {}
        return progress, checkpoint, read_pictures(folder / PICTURES_FILE), best
    except (OSError, ValidationError, UserError):
        return None  # never written, or damaged: a cell is short enough to be done again


def _train(cell: Cell) -> None:
    """Train until the budget is spent, evaluating and saving wherever the schedule says."""
    progress, size = cell.progress, cell.plan.size
    due = [share * size.budget for share in size.schedule if share * size.budget > progress.spent(size)]
    images = cell.trainer.config.training.images
    _measure_guards_base(cell)
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


def _measure_guards_base(cell: Cell) -> None:
    """Have the guard measure the base now, for that is no training either."""
    started, guard = time.perf_counter(), cell.trainer.guard
    if guard is not None:
        guard.measure_base()
        cell.progress.evaluation_seconds += time.perf_counter() - started


def _evaluate(cell: Cell) -> None:
    """Measure the averaged adapter as it is now and draw the report's pictures, outside the budget."""
    started, progress, policy, plan = time.perf_counter(), cell.progress, cell.trainer.policy, cell.plan
    weights = cell.trainer.average_now()
    with policy.with_weights(weights):
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
        rows = cell.evaluator.curve(policy, cell.subject, plan.guidance)
        cell.pictures.append(rows)
        if plan.keeps_best:
            cell.pictures.append(cell.evaluator.measure(policy, cell.subject, VALIDATION, plan.guidance))
        save_gallery(cell.evaluator, policy, plan.guidance, gallery_file(cell.folder, cell.subject.checkpoint))
    if plan.keeps_best and best_checkpoint(plan, cell.evaluator, join(cell.pictures)) == cell.subject.checkpoint:
        progress.best, cell.best = cell.subject.checkpoint, weights
    progress.evaluation_seconds += time.perf_counter() - started
    metric, test = plan.task.headline_metric, cell.evaluator.sets[TEST]
    value = headline(_of_set(rows, TEST), test, metric, plan.least_prompts(TEST))
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
        if cell.best:
            write_best(cell.folder, cell.progress.best, cell.best)
        write_text_atomically(cell.folder / PROGRESS_FILE, cell.progress.model_dump_json() + "\n")
        forget_best(cell.folder, but=cell.progress.best)

    cell.processes.on_main(write)


def _finish(cell: Cell) -> None:
    """Choose the guidance, measure at it, export, and write ``cell.json``, which says that the cell is done."""
    started, weights, policy = time.perf_counter(), cell.trainer.average_now(), cell.trainer.policy
    guidance, best = _measure_at_best(cell, weights, cell.subject), None
    if cell.best:
        last, adapter = cell.progress.best == cell.subject.checkpoint, RunFolder(cell.folder).adapter
        subject = Subject(cell.entry, cell.seed, cell.progress.best)
        best = BestCheckpoint(
            checkpoint=subject.checkpoint,
            guidance=guidance if last else _measure_at_best(cell, cell.best, subject),
            adapter=_beside_results(cell, adapter if last else best_adapter_file(cell.folder)),
        )
    if changes_nothing(weights):
        cell.tell("the adapter is all zeros and changes nothing: no update did anything", share=1.0)
    peak = largest_peak(cell.processes, policy.device)
    seconds = cell.progress.evaluation_seconds + time.perf_counter() - started
    alarms = [] if (guard := cell.trainer.guard) is None else without_folders(map(str, guard.state.alarms))
    record = CellRecord(
        entry=cell.entry,
        seed=cell.seed,
        status="done",
        checkpoints=cell.progress.checkpoints,
        guidance=guidance,
        best=best,
        processes=cell.processes.count,
        peak_memory=peak,
        evaluation_seconds=round(seconds, 4),
        adapter=_beside_results(cell, RunFolder(cell.folder).adapter),
        alarms=alarms,
        commit=git_hash(),
    )
    cell.processes.on_main(lambda: _write_finished(cell, weights, record))


def _measure_at_best(cell: Cell, weights: dict[str, Tensor], subject: Subject) -> float:
    """Choose the guidance that suits a checkpoint's weights, and measure the rest of its pictures at it."""
    policy, plan = cell.trainer.policy, cell.plan
    with policy.with_weights(weights):
        best, rows = best_guidance(plan, cell.evaluator, policy, subject, join(cell.pictures))
        cell.pictures += [rows, cell.evaluator.finished(policy, subject, best, plan.guidance)]
    return best


def _write_finished(cell: Cell, weights: dict[str, Tensor], record: CellRecord) -> None:
    """Write the adapters, the pictures' table and, last, ``cell.json``; what it could have gone on from is removed."""
    cell.check_folder()
    wait_for(base_file(cell.comparison))  # measured beside the first cells, and the adapters' cards have it
    pictures, trainer, test = join(cell.pictures), cell.trainer, cell.evaluator.sets[TEST]
    rows = join([read_pictures(base_pictures_file(cell.comparison)), pictures])
    told = facts(cell.plan, trainer, rows, test, cell.subject.checkpoint, trainer.exported_steps)
    export_adapter(trainer.policy, weights, cell.comparison / record.adapter, told)
    if record.best is not None and record.best.adapter != record.adapter:
        steps = record.checkpoints[record.best.checkpoint].steps
        told = facts(cell.plan, trainer, rows, test, record.best.checkpoint, steps)
        export_adapter(trainer.policy, cell.best, cell.comparison / record.best.adapter, told)
    write_pictures(pictures, cell.folder / PICTURES_FILE)
    write_record(record, cell_file(cell.comparison, cell.entry, cell.seed))
    shutil.rmtree(cell.folder / FOLDER, ignore_errors=True)
    (cell.folder / PROGRESS_FILE).unlink(missing_ok=True)
    forget_best(cell.folder)


def _beside_results(cell: Cell, path: Path) -> str:
    return path.relative_to(cell.comparison).as_posix()


def largest_peak(processes: Processes, device: torch.device) -> int:
    """Bytes of memory at the most, on the process that had most."""
    own = peak_bytes(runs_on_cpu())
    return own if processes.count == 1 else int(processes.largest(torch.tensor(own, device=device)))


def save_gallery(evaluator: Evaluator, policy: Policy, guidance: float, path: Path) -> None:
    """Draw the report's prompts in a row, with the weights that are in place."""
    pictures = evaluator.gallery(policy, guidance)
    evaluator.processes.on_main(lambda: write_gallery(pictures, path))
