"""Signals that ask a run to stop."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from dgpo_plugin.common.signals import ENDING, handled, heeded, known

STOPPING = ("SIGINT", *ENDING)
"""Signals that end a run after the iteration under way."""
AGAIN = 0.01
"""Seconds until an interrupt that could not be raised comes again."""


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Signals that ask to stop, each as Ctrl-C, where there is no iteration to end first: while a run loads, say.

    One that comes while Python destroys an object, where it can only print what is raised and go on, comes once more.
    """
    before, again = sys.unraisablehook, list[threading.Timer]()

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if not isinstance(found.exc_value, KeyboardInterrupt):
            before(found)
            return
        again.append(threading.Timer(AGAIN, _thread.interrupt_main))  # not at once, which would be in the destruction
        again[-1].start()

    sys.unraisablehook = unraisable
    try:
        with handled(_stopping(), _interrupt):
            yield
    finally:
        sys.unraisablehook = before
        for timer in again:
            timer.cancel()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stopping() -> list[int]:
    """The numbers of those that this system has, without a SIGHUP that nohup has ignored."""
    hangup = known(["SIGHUP"])
    return [number for number in known(STOPPING) if number not in hangup or heeded(["SIGHUP"])]


@contextlib.contextmanager
def stop_signals(console: Console) -> Iterator[list[int]]:
    """Signals that came in the block, only noted; but a second Ctrl-C acts.

    SIGTERM never does: launchers send it after Ctrl-C, and clusters before they take a machine back. Nor do SIGUSR1,
    which Slurm sends for that, and SIGHUP, a closed terminal's, unless nohup has it ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            console.print("stopping after this iteration; Ctrl-C again stops at once")

    before = {number: signal.signal(number, note) for number in _stopping()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            # A launcher's SIGTERM, which comes after Ctrl-C, must not cut off what is written at the end.
            is_told = bool(received) and handler is _interrupt and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_told else handler)
