"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that end a run after the iteration under way."""


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

    # Not every system has them all.
    known = {name: getattr(signal, name) for name in STOPPING if hasattr(signal, name)}
    if signal.getsignal(known.get("SIGHUP", signal.SIGINT)) is signal.SIG_IGN:
        known.pop("SIGHUP", None)
    before = {number: signal.signal(number, note) for number in known.values()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
