"""The processes of a comparison: each does one task after another, and of one that dies it is known what it was doing.

They talk through a pipe each. A worker ends with its comparison, however that went.
"""

from __future__ import annotations

import contextlib
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

from .devices import gpu_count, pin
from .plan import Event, Listener, Plan

LEAVING = 10.0
"""Seconds that a worker has to end in order, which frees its semaphores."""
KEPT = "what is finished is kept, and the same command goes on with the rest"


@dataclass(frozen=True)
class Task:
    """Something for a worker to do: measure the ``base``, time an algorithm, or do one of its runs."""

    kind: Literal["base", "timing", "run"]
    algorithm: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind == "base":
            return "the base's evaluation"
        return f"timing {self.algorithm}" if self.kind == "timing" else f"{self.algorithm}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a worker's task ended.

    Attributes:
        status: ``refused`` for what the user can mend, ``failed`` for a bug.
        result: of a task that is done: what it measured, or None for one that writes files.
        reason: a line for the user if it was refused, a traceback if it failed.
    """

    status: Literal["done", "refused", "failed"]
    result: Any = None
    reason: str = ""


@dataclass
class Worker:
    """A process, this end of its pipe, and the task that it was given."""

    process: Any
    pipe: Any
    task: Task | None = None


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
                workers.append(_start(plan, folder, number))
            yield workers
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(LEAVING)
                worker.process.kill()
                worker.process.join()


def run_tasks(
    workers: Sequence[Worker], tasks: Sequence[Task], listener: Listener, after_each: Callable[[], object]
) -> dict[Task, Any]:
    """Have tasks done, in their order, each by the next worker that is free.

    Returns:
        The result of each.

    Raises:
        UserError: a task that was refused, or whose process died.
        RuntimeError: a bug in a task, with its traceback.
    """
    waiting, results = deque(tasks), dict[Task, Any]()
    for worker in workers:
        _assign(worker, waiting)
    while busy := {worker.pipe: worker for worker in workers if worker.task is not None}:
        for pipe in connection.wait(list(busy), timeout=1):
            worker = busy[pipe]
            outcome = _receive(worker, listener)
            if outcome is not None:
                assert worker.task is not None
                results[worker.task] = outcome.result
                after_each()
                _assign(worker, waiting)
    return results


def _start(plan: Plan, folder: Path, number: int) -> Worker:
    from dgpo_plugin.distributed.processor import bf16_is_ready

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gpu = number if gpu_count() else None
    process = context.Process(target=_serve, args=(theirs, plan, folder, bf16_is_ready(), gpu), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    return Worker(process, ours)


def _assign(worker: Worker, waiting: deque[Task]) -> None:
    worker.task = waiting.popleft() if waiting else None
    if worker.task is not None:
        try:
            worker.pipe.send(worker.task)
        except OSError as error:
            raise _death_of(worker) from error


def _receive(worker: Worker, listener: Listener) -> Outcome | None:
    """The outcome of a worker's task if it is over, else None; an event goes to the listener."""
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
        raise RuntimeError(f"{worker.task}:\n{message.reason}")
    return message


def _death_of(worker: Worker) -> UserError:
    worker.process.join()
    return UserError(f"{worker.task}: its process {how_it_ended(worker.process.exitcode)}; {KEPT}")


LEAVING_ON = ("SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that end a comparison, and a session on a card: a cluster's and a closed terminal's."""


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let signals end the block in order, so that no worker outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = [getattr(signal, name) for name in LEAVING_ON if hasattr(signal, name)]
    before = {n: signal.signal(n, _leave) for n in known if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
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


def _attempt(plan: Plan, folder: Path, task: Task, listener: Listener) -> Outcome:
    try:
        return Outcome("done", _perform(plan, folder, task, listener))
    except UserError as error:
        return Outcome("refused", reason=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            advice = "fewer --jobs, or a smaller training.micro_batch_size in the preset"
            return Outcome("refused", reason=f"{task}: out of memory; give {advice}; {KEPT}")
        if isinstance(error, OSError):
            where = error.filename or "a file"
            return Outcome("refused", reason=f"{task}: {where}: {reason(error)}; see to its disk; {KEPT}")
        return Outcome("failed", reason=traceback.format_exc())


def _perform(plan: Plan, folder: Path, task: Task, listener: Listener) -> Any:
    if task.kind == "base":
        from .cell import measure_base

        return measure_base(plan, folder)
    if task.kind == "timing":
        from .forecast import time_algorithm

        return time_algorithm(plan, task.algorithm)
    from .cell import run_cell

    return run_cell(plan, folder, task.algorithm, task.seed, listener)
