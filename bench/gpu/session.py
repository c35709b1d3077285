"""A session on a card: row after row, each in its own process, until the time is over; what is done is kept."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dgpo_plugin.common.faults import how_it_ended
from dgpo_plugin.common.provenance import package_versions

from .child import Answer, Task, serve
from .results import Result, append_result, read_results
from .rows import Row

LEAST_SECONDS = 15.0
"""Left of a session, under which no further row is begun."""


@dataclass
class _Child:
    process: Any
    pipe: Any


def measure(
    rows: Sequence[Row], folder: Path, minutes: float, say: Callable[[str], None], *, tiny: bool, again: bool
) -> list[str]:
    """Measure rows, and keep each as soon as it is done.

    Args:
        again: also those that are in the folder already.

    Returns:
        The rows that there was no time for.
    """
    before = read_results(folder)
    done = {} if again else before
    waiting = [row for row in rows if row.name not in done or done[row.name].rehearsal != tiny]
    end = time.monotonic() + 60 * minutes
    tried_too_large = any(result.anyway for result in before.values())
    with _ahead(tiny=tiny) as next_child:
        for number, row in enumerate(waiting):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                return [later.name for later in waiting[number:]]
            say(f"{row.name}: {row.about}, row {number + 1} of {len(waiting)}, {left / 60:.1f} min left")
            result = _one(next_child(), Task(row, folder), min(60 * row.minutes, left), tiny=tiny)
            if result.status == "does not fit" and not tried_too_large and end - time.monotonic() > LEAST_SECONDS:
                # One of them all the same: it tests the plan.
                tried_too_large = True
                seconds = min(60 * row.minutes, end - time.monotonic())
                result = _one(next_child(), Task(row, folder, anyway=True), seconds, tiny=tiny)
            append_result(folder, result)
            reason = f", {result.reason}" if result.reason else ""
            say(f"{row.name}: {result.status}{reason}, after {result.seconds:.0f} s")
    return []


def _one(child: _Child, task: Task, seconds: float, *, tiny: bool) -> Result:
    started = time.monotonic()
    answer: Answer
    try:
        child.pipe.send(task)
        heard = child.pipe.poll(seconds)
        answer = child.pipe.recv() if heard else Answer("timed out", reason=f"after {seconds:.0f} s")
    except (EOFError, OSError):
        child.process.join(5)
        answer = Answer("failed", reason=f"its process {how_it_ended(child.process.exitcode)}")
    _end(child)
    return Result(
        row=task.row.name,
        about=task.row.about,
        status=answer.status,
        rehearsal=tiny,
        anyway=task.anyway,
        reason=answer.reason,
        seconds=round(time.monotonic() - started, 1),
        measured=answer.measured,
        device=answer.device,
        state=answer.state,
        packages=package_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


@contextlib.contextmanager
def _ahead(*, tiny: bool) -> Iterator[Callable[[], _Child]]:
    """A source of processes, of which one is always being made ready while another measures."""
    ready = [_start(tiny=tiny)]
    begun: list[_Child] = []

    def take() -> _Child:
        child = ready.pop()
        begun.append(child)
        ready.append(_start(tiny=tiny))
        return child

    try:
        yield take
    finally:
        for child in (*begun, *ready):
            _end(child)


def _start(*, tiny: bool) -> _Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), kwargs={"tiny": tiny})
    process.start()
    theirs.close()
    return _Child(process, ours)


def _end(child: _Child) -> None:
    """First kindly: it may have processes of its own to end."""
    child.pipe.close()
    if child.process.is_alive():
        child.process.terminate()
        child.process.join(5)
    if child.process.is_alive():
        child.process.kill()
    child.process.join()
