"""One comparison: every (entry, seed) from the same base, on the same prompts, with the same budget.

Each cell runs in one or more processes of its own with own threads; what it finishes is kept, and a comparison that
was stopped goes on with the cells that are missing. A cell that fails is a result with its reason; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.folder_lock import only_process

from .claim import ContentsChanged, claim_folder, claimed
from .gather import gather
from .measures import check_metrics
from .plan import Listener, Plan, base_file, cell_file, run_folder
from .prompt_sets import check_prompts
from .records import Results
from .size import CONTROLS
from .worker_process import Job
from .workers import ProcessDied, do_in_order, run_jobs, start_workers
from .written import MISSING_FILE, base_is_measured, read_cell, write_failed

BASE_CELL = "base"
"""What ``--only`` calls the base's measurement."""
FAILURE_FILE = "failure.txt"
"""The traceback of a cell that failed by a bug, in its folder."""


def compare(plan: Plan, folder: Path, listener: Listener, *, retry: bool = False) -> Results:
    """Run what is missing and gather everything.

    Args:
        retry: do failed cells again, from where they were saved; one whose process died is gone on with anyway.

    Raises:
        UserError: the folder was made by another plan, prompts that overlap, a metric that is missing, a budget too
            small for one iteration, the base's measurement failed, or every single cell did.
    """
    with only_process(folder) as held, claimed(plan, folder) as plan:
        forget_failed(plan, folder, only_died=not retry)
        missing = [cell for cell in plan.cells if not cell_file(folder, *cell).exists()]
        if missing:
            check_task(plan)
            run_missing(plan, folder, missing, listener)
        held.check()
        results = gather(plan, folder)
    if results.cells and all(cell.status == "failed" for cell in results.cells):
        raise UserError(f"every cell failed; {failures(results)[0]}")
    return results


def run_only(plan: Plan, folder: Path, entry: str, seed: int, listener: Listener) -> None:
    """Run one cell, or the base's measurement; others of the folder may run elsewhere meanwhile.

    It runs in this process, unless the plan has more for it.

    Raises:
        UserError: no such cell, the base was not measured yet, or what makes the cell fail, which is written down too.
    """
    plan = claim_folder(plan, folder)
    if entry == BASE_CELL:
        check_task(plan)
        do_in_order(plan, folder, [Job("base")], listener)
        return
    if (entry, seed) not in plan.cells:
        raise UserError(f"--only {entry}:{seed}: no such cell; entries are {', '.join(plan.entries)}")
    if not base_file(folder).exists():
        raise UserError(f"--only {entry}:{seed}: the base comes first; run the same command with --only base")
    forget_failed(plan, folder, [(entry, seed)], only_died=True)
    if cell_file(folder, entry, seed).exists():
        return
    try:
        do_in_order(plan, folder, [Job("cell", entry, seed)], listener)
    except (ProcessDied, ContentsChanged):
        raise  # nothing is wrong with the cell: the same command goes on with it, or with what was there before
    except Exception as error:
        write_failed(folder, entry, seed, " ".join(str(error).split()) or type(error).__name__)
        raise


def check_task(plan: Plan) -> None:
    """Find out what is wrong with a task before anything is loaded.

    Raises:
        UserError: prompts that overlap, or a metric that is unknown or missing.
    """
    check_metrics(plan.task)
    check_prompts(plan.task)


def run_missing(plan: Plan, folder: Path, missing: list[tuple[str, int]], listener: Listener) -> None:
    """Time one algorithm and say what the cells will take, measure the base and do them, whenever a worker is free.

    All have the same budget, and do about as much of it a second: timing each of them would say little more, for some
    seconds each.

    Raises:
        UserError: the base or a timing that was refused, or whose process died.
    """
    base = [] if base_is_measured(plan, folder) else [Job("base")]
    if not base_file(folder).exists() and not run_folder(folder, *missing[0]).parent.exists():
        (folder / MISSING_FILE).unlink(missing_ok=True)  # nothing was measured yet, so what is there counts now
    wanted = dict(missing)
    algorithms = [entry for entry in plan.entries if entry in wanted and entry not in CONTROLS] or [plan.entries[0]]
    timed = plan.preset.challenger if plan.preset.challenger in algorithms else algorithms[0]
    first = [Job("timing", timed), *base]
    jobs = [*first, *(Job("cell", entry, seed) for entry, seed in missing)]
    with start_workers(plan, folder, min(plan.jobs, max(len(missing), len(first)))) as workers:
        from .forecast import forecast  # which takes the seconds that the workers need for it too

        def failed(job: Job, reason: str) -> None:
            lines = reason.strip().splitlines()
            if len(lines) > 1:  # a bug's traceback
                write_text_atomically(run_folder(folder, job.entry, job.seed) / FAILURE_FILE, reason)
                reason = f"{lines[-1]} (a bug; {FAILURE_FILE} in its folder says where)"
            write_failed(folder, job.entry, job.seed, reason)

        def died(job: Job, reason: str) -> None:
            write_failed(folder, job.entry, job.seed, reason, died=True)

        def done(job: Job, result: Any) -> None:
            if job.kind == "timing":
                listener.expect(forecast(plan, missing, result, base=bool(base)))

        run_jobs(workers, jobs, listener, done, failed, died, needed=first)


def failures(results: Results) -> list[str]:
    """A line for each cell that failed."""
    return [
        cell.reason if cell.died else f"{cell.entry}, seed {cell.seed} failed: {cell.reason}; --retry tries it again"
        for cell in results.cells
        if cell.status == "failed"
    ]


def forget_failed(
    plan: Plan, folder: Path, cells: Sequence[tuple[str, int]] | None = None, *, only_died: bool = False
) -> None:
    """Have failed cells done again; what they had saved is gone on from.

    Args:
        cells: which; None for all of the plan.
        only_died: those alone whose process died.
    """
    for entry, seed in plan.cells if cells is None else cells:
        file = cell_file(folder, entry, seed)
        if file.exists() and (cell := read_cell(file)).status == "failed" and (cell.died or not only_died):
            file.unlink()
