"""Signals that ask a program to end: which there are, and a handler for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

ENDING = ("SIGTERM", "SIGHUP", "SIGUSR1")
"""A cluster's or a launcher's, a closed terminal's, and Slurm's before it takes a machine back; besides Ctrl-C's."""
Handler = Callable[[int, FrameType | None], object]


def known(names: Sequence[str]) -> list[int]:
    """The numbers of those that this system has, in order."""
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def heeded(names: Sequence[str]) -> list[int]:
    """The numbers of those that this system has and this process does not ignore, as under nohup a closed terminal."""
    return [number for number in known(names) if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Have a handler take some signals in the block; outside the main thread, where Python allows none, nothing is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
