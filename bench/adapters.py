"""Finished adapters, whoever made them, measured as the cells of a comparison are: the same prompts and noise."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from dgpo_plugin.adapters.load import apply_adapter, load_base, read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.folder_lock import only_process
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer

from .base import best_guidance, evaluator_of
from .cell import START, largest_peak, save_gallery
from .claim import claimed
from .commit import git_hash
from .compare import check_task
from .contents import hold_to_contents, hold_to_metrics
from .evaluate import Evaluator, Subject
from .gather import gather
from .pictures import PICTURES_FILE, join, write_pictures
from .plan import Plan, cell_file, kept_folder, run_folder
from .records import BASE, CellRecord, Results, write_record
from .worker_process import Job, Unheard
from .workers import do_in_order
from .written import base_is_measured, gallery_file, missing_metrics

SEED = 0
"""An adapter's, which was trained elsewhere with one that is not known."""


def evaluate_adapters(plan: Plan, folder: Path) -> Results:
    """Measure the base and every adapter of a plan, at the guidance that suits each best on validation prompts.

    What is measured already is kept. One model is in memory at a time.

    Raises:
        UserError: a file that is no adapter of this base or whose scale cannot be told, a folder of another plan,
            prompts that overlap, or a metric that is missing.
        ProcessDied: of several processes one died.
    """
    hashes = {}
    for entry, path in plan.adapters.items():
        adapter = read_adapter(Path(path))
        if doubt := adapter.usable.doubt:
            raise UserError(f"adapter {path}: the scale is unknown: {doubt}; bring that, for it is measured at its own")
        hashes[entry] = adapter.content_hash
    plan = plan.model_copy(update={"adapter_sha256": hashes})
    with only_process(folder), claimed(plan, folder) as plan:
        check_task(plan)
        jobs = [] if base_is_measured(plan, folder) else [Job("base")]
        jobs += [Job("adapters")] if _missing(plan, folder) else []
        do_in_order(plan, folder, jobs, Unheard())
        return gather(plan, folder)


def measure_adapters(plan: Plan, folder: Path) -> None:
    """Measure those of a plan's adapters that are not yet, one after the other; the base is measured by then.

    Several processes call it together.

    Raises:
        UserError: a file that is no adapter of this base, or a metric that fails.
    """
    config = plan.base_config()
    base = build_trainer(config)
    missing_there = missing_metrics(folder)
    evaluator = evaluator_of(plan, base, missing=missing_there, kept=kept_folder(plan, folder))
    hold_to_contents(folder, base, evaluator.sets)
    hold_to_metrics(folder, evaluator)
    del base  # the evaluator has what it needs of it
    for entry in evaluator.processes.decided_by_main(lambda: _missing(plan, folder)):
        _measure(plan, folder, entry, config, evaluator)


def _missing(plan: Plan, folder: Path) -> list[str]:
    return [entry for entry in plan.entries if not cell_file(folder, entry, SEED).exists()]


def _measure(plan: Plan, folder: Path, entry: str, config: RunConfig, evaluator: Evaluator) -> None:
    """One adapter's rows, pictures and record, at its true scale."""
    started, cell = time.perf_counter(), run_folder(folder, entry, SEED)
    model = load_base(config.model, best_device())
    apply_adapter(model, Path(plan.adapters[entry]))
    # An untrained LoRA beside it, which is switched off.
    policy, subject = Policy(model, config.lora, SEED), Subject(entry, SEED, 1)
    with policy.as_reference():
        drift = evaluator.drift(policy)
        best, rows = best_guidance(plan, evaluator, policy, subject)
        curve = evaluator.curve(policy, subject, plan.guidance)
        rest = evaluator.finished(policy, subject, best, plan.guidance)
        save_gallery(evaluator, policy, plan.guidance, gallery_file(cell, subject.checkpoint))
    record = CellRecord(
        entry=entry,
        seed=SEED,
        status="done",
        checkpoints=[START, START.model_copy(update={"drift": drift, "flops": None})],
        guidance=best,
        processes=evaluator.processes.count,
        peak_memory=largest_peak(evaluator.processes, policy.device),
        evaluation_seconds=round(time.perf_counter() - started, 4),
        commit=git_hash(),
    )

    def write() -> None:
        write_pictures(join([rows, curve, rest]), cell / PICTURES_FILE)
        write_record(record, cell_file(folder, entry, SEED))

    evaluator.processes.on_main(write)


def named_adapters(paths: Sequence[Path]) -> dict[str, str]:
    """Adapters' files by a name each: the file's, or its folder's where the file's says nothing.

    Raises:
        UserError: one stands there twice.
    """
    named: dict[str, str] = {}
    for path in paths:
        usual = path.stem in ("adapter", "adapter_model", "pytorch_lora_weights")
        name = path.resolve().parent.name if usual else path.stem
        if str(path) in named.values():
            raise UserError(f"--adapter {path}: stands there twice")
        # The untrained base's name is taken; a numbered name may be another file's own.
        names = itertools.chain([name] if name != BASE else [], (f"{name}-{number}" for number in itertools.count(2)))
        named[next(each for each in names if each not in named)] = str(path)
    return named
