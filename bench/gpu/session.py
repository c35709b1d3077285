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
from dgpo_plugin.common.files import writing
from dgpo_plugin.common.provenance import package_versions

from .child import Answer, Task, serve
from .results import Result, append_result, read_results
from .rows import Row

LEAST_SECONDS = 15.0
"""Seconds left of a session, under which no further row is begun."""


@dataclass
class Child:
    """A process that is ready to measure a row, and this end of its pipe."""

    process: Any
    pipe: Any


def measure(
    rows: Sequence[Row], folder: Path, minutes: float, say: Callable[[str], None], *, tiny: bool, again: bool
) -> list[str]:
    """Measure rows, and keep each as soon as it is done.

    Args:
        minutes: for all of them.
        say: is given lines to show.
        again: whether to measure also those that are in the folder already.

    Returns:
        The rows that there was no time for.
    """
    before = read_results(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # once: one that goes while rows are measured took their results
    done = {} if again else before
    waiting = [row for row in rows if row.name not in done or done[row.name].rehearsal != tiny]
    end = time.monotonic() + 60 * minutes
    tried_too_large = any(result.anyway for result in before.values())
    with _children(tiny=tiny) as next_child:
        for number, row in enumerate(waiting):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                return [later.name for later in waiting[number:]]
            say(f"{row.name}: {row.about}, row {number + 1} of {len(waiting)}, {left / 60:.1f} min left")
            result = measure_row(next_child(), Task(row, folder), min(60 * row.minutes, left), tiny=tiny)
            if result.status == "does not fit" and not tried_too_large and end - time.monotonic() > LEAST_SECONDS:
                # One of them all the same: it tests the plan.
                tried_too_large = True
                seconds = min(60 * row.minutes, end - time.monotonic())
                result = measure_row(next_child(), Task(row, folder, anyway=True), seconds, tiny=tiny)
            append_result(folder, result)
            reason = f", {result.reason}" if result.reason else ""
            say(f"{row.name}: {result.status}{reason}, after {result.seconds:.0f} s")
    return []


def measure_row(child: Child, task: Task, seconds: float, *, tiny: bool) -> Result:
    """Have a process measure a row, and end it; one that dies or takes longer than ``seconds`` is a result too."""
    started = time.monotonic()
    answer: Answer
    try:
        child.pipe.send(task)
        in_time = child.pipe.poll(seconds)
        answer = child.pipe.recv() if in_time else Answer("timed out", reason=f"after {seconds:.0f} s")
    except (EOFError, OSError):
        child.process.join(5)
        answer = Answer("failed", reason=f"its process {how_it_ended(child.process.exitcode)}")
    end_child(child)
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
def _children(*, tiny: bool) -> Iterator[Callable[[], Child]]:
    """A function that hands out processes, of which one is always being made ready while another measures."""
    ready = [start_child(tiny=tiny)]
    taken: list[Child] = []

    def take() -> Child:
        child = ready.pop()
        taken.append(child)
        ready.append(start_child(tiny=tiny))
        return child

    try:
        yield take
    finally:
        for child in (*taken, *ready):
            end_child(child)


def start_child(*, tiny: bool) -> Child:
    """Start a process, which imports what it needs while nobody waits for it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), kwargs={"tiny": tiny})
    process.start()
    theirs.close()
    return Child(process, ours)


def end_child(child: Child) -> None:
    """End a process, first by SIGTERM: it may have processes of its own to end."""
    child.pipe.close()
    if child.process.is_alive():
        child.process.terminate()
        child.process.join(5)
    if child.process.is_alive():
        child.process.kill()
    child.process.join()
