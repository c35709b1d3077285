"""The workers of a comparison: each does one job after another, and of one that dies it is known what it was doing.

A worker is as many processes as a run has, which find one another as those of ``accelerate launch`` do. Each talks
through a pipe of its own. A worker ends with its comparison, however that went.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.faults import how_it_ended
from dgpo_plugin.common.signals import ENDING, handled, heeded

from .devices import gpu_count, may_have_gpus
from .plan import Event, Listener, Plan
from .worker_process import KEPT, LEAVING, Job, Outcome, leave, perform, serve

_start_method: ContextVar[str] = ContextVar("start_method", default="spawn")
"""How processes are started, in multiprocessing's words."""


class ProcessDied(UserError):
    """A job that was cut off, because a process that did it is gone: nothing is wrong with the job itself."""


@dataclass
class Rank:
    """One process of a worker, and this end of its pipe.

    Attributes:
        outcome: of the worker's job, once this process has told it or died.
    """

    process: Any
    pipe: Any
    outcome: Outcome | None = None


@dataclass
class Worker:
    """The processes of a run, by rank, what they were given to do, and what starts others in their place.

    Attributes:
        meeting: where its processes find one another; None for a single one.
    """

    start: Callable[[], tuple[list[Rank], Any]]
    ranks: list[Rank]
    meeting: Any
    job: Job | None = None

    def give(self, job: Job | None) -> None:
        """Have it do a job, in new processes if one is gone; None for nothing."""
        self.job = job
        if job is None:
            return
        if not all(rank.process.is_alive() for rank in self.ranks):
            end_processes([self])
            self.ranks, self.meeting = self.start()
        for rank in self.ranks:
            rank.outcome = None
            with contextlib.suppress(OSError):  # it died just now, which its pipe will tell
                rank.pipe.send(job)

    def told_of(self, rank: Rank, end: str) -> str:
        """A line about one process's end."""
        count = len(self.ranks)
        name = "its process" if count == 1 else f"its process {self.ranks.index(rank)} of {count}"
        return f"{self.job}: {name} {end}; {KEPT}"


@contextlib.contextmanager
def importing_ahead() -> Iterator[None]:
    """Have a process import what workers need, while this one goes on: those started in the block are forked from it.

    Without it each imports for itself, which takes seconds, and only once it is known what it is to do. A process that
    has looked for GPUs must not be forked, so workers that may have GPUs of their own are started anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods() or may_have_gpus():
        yield
        return
    _set_threads(1)  # of what is not torch's, which is told by each worker
    multiprocessing.set_forkserver_preload([f"{__package__}.worker_imports"])
    forkserver.ensure_running()
    token = _start_method.set("forkserver")
    try:
        yield
    finally:
        _start_method.reset(token)


@contextlib.contextmanager
def start_workers(plan: Plan, folder: Path, count: int) -> Iterator[list[Worker]]:
    """Start ``count`` workers for the block; whatever happens in it, none outlives it."""
    _set_threads(plan.threads)
    workers: list[Worker] = []
    with signals_as_exit():
        try:
            for number in range(count):
                start = functools.partial(_start, plan, folder, number)
                workers.append(Worker(start, *start()))
            yield workers
        finally:
            end_processes(workers)


def _set_threads(count: int) -> None:
    """Have processes that start from now on compute with so many threads, as OpenMP and MKL read when they start."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(count)


def end_processes(workers: Sequence[Worker]) -> None:
    """End all processes of some workers, and wait for their end."""
    processes = [rank.process for worker in workers for rank in worker.ranks]
    for process in processes:
        process.terminate()
    until = time.monotonic() + LEAVING
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()


def run_jobs(
    workers: Sequence[Worker],
    jobs: Sequence[Job],
    listener: Listener,
    after_each: Callable[[Job, Any], object],
    failed: Callable[[Job, str], None] | None = None,
    died: Callable[[Job, str], None] | None = None,
    needed: Sequence[Job] = (),
) -> None:
    """Have jobs done, in their order, each by the next worker that is free.

    Args:
        after_each: takes a job that is done and its result.
        failed: takes a job that was refused, had a bug or whose process died, and the reason in a line; the others go
            on. None to raise instead.
        died: takes one whose process died, in the place of ``failed``.
        needed: jobs that nothing goes on without: they raise whatever is given for the others.

    Raises:
        UserError: a job that was refused; one, whatever takes those, for what refuses all.
        ProcessDied: one of which a process died, or does not answer.
        RuntimeError: a bug in a job, with its traceback.
    """
    waiting = deque(jobs)
    for worker in workers:
        worker.give(_next(waiting))
    while busy := {rank.pipe: (worker, rank) for worker in workers for rank in _awaited(worker)}:
        for pipe in connection.wait(list(busy), timeout=1):
            worker, rank = busy[pipe]
            if rank not in _awaited(worker):
                continue  # what was heard of another has ended its job
            _hear(rank, listener)
            outcome, job = _ended(worker, listener), worker.job
            if outcome is None:
                continue
            assert job is not None
            if outcome.status == "done":
                after_each(job, outcome.result)
            elif outcome.status == "died" and died is not None and job not in needed:
                died(job, outcome.reason)
            elif failed is None or job in needed or outcome.status == "changed":
                kinds = {"failed": RuntimeError, "died": ProcessDied}
                raise kinds.get(outcome.status, UserError)(outcome.reason)
            else:
                failed(job, outcome.reason)
            worker.give(_next(waiting))


def do_in_order(plan: Plan, folder: Path, jobs: Sequence[Job], listener: Listener) -> None:
    """Have jobs done one after the other: in this process, unless the plan has more for each.

    Raises:
        UserError: a job that was refused.
        ProcessDied: one of whose several processes one died.
    """
    if plan.processes == 1:
        for job in jobs:
            perform(plan, folder, job, listener)
    elif jobs:
        with start_workers(plan, folder, 1) as workers:
            run_jobs(workers, jobs, listener, lambda *_: None)


def _next(waiting: deque[Job]) -> Job | None:
    return waiting.popleft() if waiting else None


def _awaited(worker: Worker) -> list[Rank]:
    """The processes of a worker that have not told how its job ended."""
    return [rank for rank in worker.ranks if rank.outcome is None] if worker.job is not None else []


def _hear(rank: Rank, listener: Listener) -> None:
    """Take what a process says: an event for the listener, its outcome, or that it died."""
    try:
        message = rank.pipe.recv()
    except (EOFError, OSError):
        rank.outcome = Outcome("died", reason=_death_of(rank))
        return
    if isinstance(message, Event):
        listener.listen(message)
        return
    assert isinstance(message, Outcome)
    rank.outcome = message


def _ended(worker: Worker, listener: Listener) -> Outcome | None:
    """How a worker's job ended, if it has: well if it did in all processes, else as the one says that knows most.

    Processes that have lost another do not know why: that one is waited for. Where a job went wrong in one of several,
    the others may still be in the middle of it, and all are ended.
    """
    if all(rank.outcome is not None and rank.outcome.status == "done" for rank in worker.ranks):
        return worker.ranks[0].outcome
    if all(rank.outcome is None or rank.outcome.status == "done" for rank in worker.ranks):
        return None
    until = time.monotonic() + LEAVING
    while not _known(worker) and (silent := _awaited(worker)) and (left := until - time.monotonic()) > 0:
        for pipe in connection.wait([rank.pipe for rank in silent], timeout=left):
            _hear(next(rank for rank in silent if rank.pipe is pipe), listener)
    outcome = _told(worker)
    if len(worker.ranks) > 1:
        end_processes([worker])
    return outcome


def _known(worker: Worker) -> bool:
    """Whether a process has told, or shown, what went wrong."""
    return any(
        rank.outcome is not None and rank.outcome.status in ("died", "refused", "changed") for rank in worker.ranks
    )


def _told(worker: Worker) -> Outcome:
    """How a job went wrong: a process that died says most, then a refusal, then a bug, then one that is silent."""
    for status in ("died", "refused", "changed", "failed"):
        for rank in worker.ranks:
            if rank.outcome is not None and rank.outcome.status == status:
                if status == "died":
                    return Outcome("died", reason=worker.told_of(rank, rank.outcome.reason))
                if status == "failed":
                    return Outcome("failed", reason=f"{worker.job}:\n{rank.outcome.reason}")
                return rank.outcome
    silent = _awaited(worker)
    if not silent:  # all lost the others, and none says why
        return Outcome("died", reason=f"{worker.job}: its processes lost one another; {KEPT}")
    return Outcome("died", reason=worker.told_of(silent[0], "did not answer within training.process_timeout"))


def _start(plan: Plan, folder: Path, number: int) -> tuple[list[Rank], Any]:
    """Start the processes of one worker."""
    from dgpo_plugin.distributed.processor import bf16_is_ready

    context: Any = multiprocessing.get_context(_start_method.get())
    gpu = number if gpu_count() else None
    meeting, places = _meeting_place(plan.processes)
    ranks = []
    for place in places:
        ours, theirs = context.Pipe()
        given = (theirs, plan, folder, bf16_is_ready(), gpu, place, dict(os.environ))
        process = context.Process(target=serve, args=given, daemon=True)
        process.start()
        theirs.close()  # or its end would not be seen here
        ranks.append(Rank(process, ours))
    return ranks, meeting


def _meeting_place(count: int) -> tuple[Any, list[dict[str, str]]]:
    """Where so many processes find one another, kept in this one, and what each reads of it in its environment.

    The variables are torchrun's, which accelerate's launcher starts, its agent's store among them
    (torch/distributed/rendezvous.py, ``_create_c10d_store``): a port that is open already is nobody else's.
    """
    if count == 1:
        return None, [{}]
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though it is not in __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    return store, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _death_of(rank: Rank) -> str:
    rank.process.join()
    return how_it_ended(rank.process.exitcode)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let signals end the block in order, so that no worker outlives it."""
    with handled(heeded(ENDING), leave):
        yield
