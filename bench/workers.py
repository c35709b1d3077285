"""The processes of a comparison: each does one job after another, and of one that dies it is known what it was doing.

They talk through a pipe each. A worker ends with its comparison, however that went.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from dgpo_plugin.commands.terminal import is_out_of_memory, quieten
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.faults import how_it_ended
from dgpo_plugin.common.files import reason
from dgpo_plugin.common.signals import ENDING, handled, heeded, known

from .devices import gpu_count, pin
from .plan import Event, Listener, Plan

LEAVING = 10.0
"""Seconds that a worker has to end in order, which frees its semaphores."""
KEPT = "what is finished is kept, and the same command goes on with the rest"


@dataclass(frozen=True)
class Job:
    """Something for a worker to do: measure the ``base``, time an entry, do one of its cells or one of its trials.

    Attributes:
        seed: of a cell; of a trial its number.
    """

    kind: Literal["base", "timing", "cell", "trial"]
    entry: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind == "base":
            return "the base's evaluation"
        if self.kind == "timing":
            return f"timing {self.entry}"
        return f"{self.entry}, {'trial' if self.kind == 'trial' else 'seed'} {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a worker's job ended.

    Attributes:
        status: ``refused`` for what the user can mend, ``failed`` for a bug.
        result: of a job that is done: what it measured, or None for one that writes files.
        reason: a line for the user if it was refused, a traceback if it failed.
    """

    status: Literal["done", "refused", "failed"]
    result: Any = None
    reason: str = ""


@dataclass
class Worker:
    """A process, this end of its pipe, what it was given to do, and what starts another in its place."""

    process: Any
    pipe: Any
    start: Callable[[], tuple[Any, Any]]
    job: Job | None = None

    def start_again(self) -> None:
        """Another process in the place of one that died."""
        self.process, self.pipe = self.start()


@contextlib.contextmanager
def start_workers(plan: Plan, folder: Path, count: int) -> Iterator[list[Worker]]:
    """Start ``count`` workers for the block; whatever happens in it, none outlives it."""
    # Read by OpenMP and MKL when a worker starts, so they must be set before it does.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(plan.threads)
    workers: list[Worker] = []
    with signals_as_exit():
        try:
            for number in range(count):
                start = functools.partial(_start, plan, folder, number)
                workers.append(Worker(*start(), start))
            yield workers
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(LEAVING)
                worker.process.kill()
                worker.process.join()


def run_jobs(
    workers: Sequence[Worker],
    jobs: Sequence[Job],
    listener: Listener,
    after_each: Callable[[Job, Any], object],
    failed: Callable[[Job, str], None] | None = None,
) -> dict[Job, Any]:
    """Have jobs done, in their order, each by the next worker that is free.

    Args:
        after_each: takes a job that is done and its result.
        failed: takes a job that was refused, had a bug or whose process died, and the reason in a line; the others go
            on. None to raise instead.

    Returns:
        The result of each that is done.

    Raises:
        UserError: a job that was refused, or whose process died.
        RuntimeError: a bug in a job, with its traceback.
    """
    waiting, results = deque(jobs), dict[Job, Any]()
    for worker in workers:
        _assign(worker, waiting)
    while busy := {worker.pipe: worker for worker in workers if worker.job is not None}:
        for pipe in connection.wait(list(busy), timeout=1):
            worker = busy[pipe]
            try:
                outcome = _receive(worker, listener)
            except (UserError, RuntimeError) as error:
                if failed is None:
                    raise
                assert worker.job is not None
                failed(worker.job, str(error))
            else:
                if outcome is None:
                    continue
                assert worker.job is not None
                results[worker.job] = outcome.result
                after_each(worker.job, outcome.result)
            _assign(worker, waiting)
    return results


def _start(plan: Plan, folder: Path, number: int) -> tuple[Any, Any]:
    from dgpo_plugin.distributed.processor import bf16_is_ready

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gpu = number if gpu_count() else None
    process = context.Process(target=_serve, args=(theirs, plan, folder, bf16_is_ready(), gpu), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    return process, ours


def _assign(worker: Worker, waiting: deque[Job]) -> None:
    worker.job = waiting.popleft() if waiting else None
    if worker.job is not None:
        if not worker.process.is_alive():
            worker.start_again()
        try:
            worker.pipe.send(worker.job)
        except OSError as error:
            raise _death_of(worker) from error


def _receive(worker: Worker, listener: Listener) -> Outcome | None:
    """The outcome of a worker's job if it is over, else None; an event goes to the listener."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _death_of(worker) from error
    if isinstance(message, Event):
        listener.listen(message)
        return None
    assert isinstance(message, Outcome)
    if message.status == "refused":
        raise UserError(message.reason)
    if message.status == "failed":
        raise RuntimeError(f"{worker.job}:\n{message.reason}")
    return message


def _death_of(worker: Worker) -> UserError:
    worker.process.join()
    return UserError(f"{worker.job}: its process {how_it_ended(worker.process.exitcode)}; {KEPT}")


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let signals end the block in order, so that no worker outlives it."""
    with handled(heeded(ENDING), _leave):
        yield


# ---- in the worker


class _PipeListener:
    """A listener that sends what it is told to the comparison's process."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def expect(self, forecast: object) -> None:
        """Ignore it: a forecast is made from what the workers measure, not by them."""

    def listen(self, event: Event) -> None:
        self._pipe.send(event)


def _serve(pipe: Any, plan: Plan, folder: Path, bf16_is_ready: bool, gpu: int | None) -> None:
    # A terminal's Ctrl-C reaches all, and so does its end; the comparison ends its workers.
    for number in known(["SIGINT", "SIGHUP", "SIGUSR1"]):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_comparison, name="parent", daemon=True).start()
    quieten()
    if gpu is not None:
        pin(gpu)
    import torch

    from dgpo_plugin.distributed.processor import trust_bf16

    if bf16_is_ready:
        trust_bf16()
    torch.set_num_threads(plan.threads)
    with contextlib.suppress(EOFError, OSError):  # the comparison is gone
        while True:
            pipe.send(_attempt(plan, folder, pipe.recv(), _PipeListener(pipe)))


def _end_with_comparison() -> None:
    """End this process as soon as the comparison's is gone, a killed one included; what is done has been saved."""
    comparison = multiprocessing.parent_process()
    assert comparison is not None
    comparison.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os._exit(1)


def _attempt(plan: Plan, folder: Path, job: Job, listener: Listener) -> Outcome:
    try:
        return Outcome("done", _perform(plan, folder, job, listener))
    except UserError as error:
        return Outcome("refused", reason=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            advice = "fewer --jobs, or a smaller training.micro_batch_size in the preset"
            return Outcome("refused", reason=f"{job}: out of memory; give {advice}; {KEPT}")
        if isinstance(error, OSError):
            where = error.filename or "a file"
            return Outcome("refused", reason=f"{job}: {where}: {reason(error)}; see to its disk; {KEPT}")
        return Outcome("failed", reason=traceback.format_exc())


def _perform(plan: Plan, folder: Path, job: Job, listener: Listener) -> Any:
    if job.kind == "base":
        from .base import measure_base

        return measure_base(plan, folder)
    if job.kind == "timing":
        from .forecast import time_entry

        return time_entry(plan, job.entry)
    if job.kind == "trial":
        from .tune import run_trial

        return run_trial(plan, folder, job.entry, job.seed, listener)
    from .cell import run_cell

    return run_cell(plan, folder, job.entry, job.seed, listener)
