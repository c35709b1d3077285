"""The processes of a comparison: each does one run after another, and of one that dies it is known which run it was at.

They talk through a pipe each, so a worker whose comparison is gone, however it went, ends when it next has something to
say.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dgpo_plugin.cli import is_out_of_memory, quieten
from dgpo_plugin.errors import UserError
from dgpo_plugin.faults import how_it_ended

from .plan import Event, Listener, Plan

KEPT = "what is finished is kept, and the same command goes on with the rest"


@dataclass(frozen=True)
class Ended:
    """What a worker says of a run that is over; nothing if it went well.

    Attributes:
        refused: a line for the user.
        failed: a traceback.
    """

    refused: str = ""
    failed: str = ""


@dataclass
class Worker:
    """A process, this end of its pipe, and the (algorithm, seed) that it is at."""

    process: Any
    pipe: Any
    run: tuple[str, int] | None = None

    @property
    def at(self) -> str:
        return "" if self.run is None else f"{self.run[0]}, seed {self.run[1]}"


def run_all(
    plan: Plan, folder: Path, missing: list[tuple[str, int]], listen: Listener, after_each: Callable[[], object]
) -> None:
    """Do the missing runs, ``plan.jobs`` of them at once.

    Raises:
        UserError: a run that was refused, or whose process died; the others are stopped, and go on where they were.
    """
    # Read by OpenMP and MKL when a worker starts, so they must be set before it does.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(plan.threads)
    waiting = deque(missing)
    workers: list[Worker] = []
    with _sigterm_as_exit():
        try:
            for _ in range(min(plan.jobs, len(missing))):
                workers.append(_start(plan, folder))
                _give(workers[-1], waiting)
            while busy := {worker.pipe: worker for worker in workers if worker.run is not None}:
                for pipe in connection.wait(list(busy), timeout=1):
                    if _heard(busy[pipe], listen):
                        after_each()
                        _give(busy[pipe], waiting)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join()


def _start(plan: Plan, folder: Path) -> Worker:
    from dgpo_plugin.processor import bf16_is_ready

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, plan, folder, bf16_is_ready()), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    return Worker(process, ours)


def _give(worker: Worker, waiting: deque[tuple[str, int]]) -> None:
    worker.run = waiting.popleft() if waiting else None
    if worker.run is not None:
        try:
            worker.pipe.send(worker.run)
        except OSError as error:
            raise _died(worker) from error


def _heard(worker: Worker, listen: Listener) -> bool:
    """Whether a worker's run is over; what it says before goes to the listener."""
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _died(worker) from error
    if isinstance(said, Event):
        listen(said)
        return False
    if said.refused:
        raise UserError(said.refused)
    if said.failed:
        raise RuntimeError(f"{worker.at}:\n{said.failed}")
    return True


def _died(worker: Worker) -> UserError:
    worker.process.join()
    return UserError(f"{worker.at}: its process {how_it_ended(worker.process.exitcode)}; {KEPT}")


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM end the block in order, so that no worker outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- in the worker


def _work(pipe: Any, plan: Plan, folder: Path, bf16_is_ready: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the comparison ends its workers
    quieten()
    import torch

    from dgpo_plugin.processor import trust_bf16

    if bf16_is_ready:
        trust_bf16()
    torch.set_num_threads(plan.threads)
    with contextlib.suppress(EOFError, OSError):  # the comparison is gone
        while True:
            algorithm, seed = pipe.recv()
            pipe.send(_attempt(plan, folder, algorithm, seed, pipe.send))


def _attempt(plan: Plan, folder: Path, algorithm: str, seed: int, listen: Listener) -> Ended:
    from .single import run_one

    try:
        run_one(plan, folder, algorithm, seed, listen)
    except UserError as error:
        return Ended(refused=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            advice = "fewer --jobs, or a smaller training.micro_batch_size in the preset"
            return Ended(refused=f"{algorithm}, seed {seed}: out of memory; give {advice}; {KEPT}")
        return Ended(failed=traceback.format_exc())
    return Ended()
