"""One process of a comparison's worker: it does the jobs that come through its pipe, and ends with the comparison."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dgpo_plugin.commands.terminal import is_out_of_memory, quieten
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import reason
from dgpo_plugin.common.signals import known

from .claim import ContentsChanged
from .devices import pin
from .plan import Event, Listener, Plan

LEAVING = 10.0
"""Seconds that a worker has to end in order, which frees its semaphores."""
KEPT = "what is finished is kept, and the same command goes on with the rest"


@dataclass(frozen=True)
class Job:
    """Something to do: measure the ``base`` or ``adapters``, time an entry, train a cell or a trial.

    Attributes:
        seed: of a cell; of a trial its number.
    """

    kind: Literal["base", "adapters", "timing", "cell", "trial"]
    entry: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind in ("base", "adapters"):
            return "the base's evaluation" if self.kind == "base" else "the adapters' evaluation"
        if self.kind == "timing":
            return f"timing {self.entry}"
        return f"{self.entry}, {'trial' if self.kind == 'trial' else 'seed'} {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a worker's job ended.

    Attributes:
        status: ``refused`` for what the user can mend, ``changed`` for what refuses all other jobs too, ``failed`` for
            a bug, ``lost`` for a process that another has left alone with it, and ``died``, which no process says of
            itself.
        result: of a job that is done: what it measured, or None for one that writes files.
        reason: a line for the user if it was refused, a traceback if it failed.
    """

    status: Literal["done", "refused", "changed", "failed", "lost", "died"]
    result: Any = None
    reason: str = ""


def leave(number: int, _frame: object) -> None:
    """End this process in order, as a signal asks."""
    raise SystemExit(128 + number)


def _leave_once(number: int, frame: object) -> None:
    """As :func:`leave`, once: a signal to the whole group comes from the comparison a second time."""
    signal.signal(number, signal.SIG_IGN)
    leave(number, frame)


class _PipeListener:
    """A listener that sends what it is told to the comparison's process."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def expect(self, forecast: object) -> None:
        """Ignore it: a forecast is made from what the workers measure, not by them."""

    def listen(self, event: Event) -> None:
        self._pipe.send(event)


class Unheard:
    """A listener that nobody hears: of processes that say what the first one says, and of jobs that say nothing."""

    def expect(self, forecast: object) -> None:
        """Ignore it."""

    def listen(self, event: Event) -> None:
        """Ignore it."""


def serve(
    pipe: Any,
    plan: Plan,
    folder: Path,
    bf16_is_ready: bool,
    worker: int | None,
    place: Mapping[str, str],
    environment: Mapping[str, str],
) -> None:
    """Do one job after another that comes through a pipe, until the comparison is gone.

    Args:
        bf16_is_ready: whether the comparison has found that bf16 works here.
        worker: whose GPUs are this one's; None on a CPU.
        place: among the processes of its run, for the environment; nothing for the only one.
        environment: the comparison's, which may have changed since what this process was forked from was started.
    """
    # A terminal's Ctrl-C reaches all, and so does its end; the comparison ends its workers.
    for number in known(["SIGINT", "SIGHUP", "SIGUSR1"]):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_once)
    threading.Thread(target=_end_with_comparison, name="parent", daemon=True).start()
    quieten()
    os.environ.update({**environment, **place})
    if worker is not None:
        pin(worker, plan.processes)
    import torch

    from dgpo_plugin.distributed.processor import trust_bf16

    if bf16_is_ready:
        trust_bf16()
    torch.set_num_threads(plan.threads)
    listener = _PipeListener(pipe) if place.get("RANK", "0") == "0" else Unheard()
    with contextlib.suppress(EOFError, OSError):  # the comparison is gone
        while True:
            pipe.send(_attempt(plan, folder, pipe.recv(), listener))


def _end_with_comparison() -> None:
    """End this process as soon as the comparison's is gone, a killed one included; what is done has been saved."""
    comparison = multiprocessing.parent_process()
    assert comparison is not None
    comparison.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os._exit(1)


def _attempt(plan: Plan, folder: Path, job: Job, listener: Listener) -> Outcome:
    from dgpo_plugin.distributed.processes import LostProcess  # imports torch

    try:
        return Outcome("done", perform(plan, folder, job, listener))
    except LostProcess as error:
        return Outcome("lost", reason=str(error))
    except ContentsChanged as error:
        return Outcome("changed", reason=str(error))
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


def perform(plan: Plan, folder: Path, job: Job, listener: Listener) -> Any:
    """Do a job in this process, which may be one of several that do it together, and return what it measured."""
    if job.kind == "base":
        from .base import measure_base

        return measure_base(plan, folder)
    if job.kind == "adapters":
        from .adapters import measure_adapters

        return measure_adapters(plan, folder)
    if job.kind == "timing":
        from .forecast import time_entry

        return time_entry(plan, folder, job.entry)
    if job.kind == "trial":
        from .tune import run_trial

        return run_trial(plan, folder, job.entry, job.seed, listener)
    from .cell import run_cell

    return run_cell(plan, folder, job.entry, job.seed, listener)
