"""How far something long is, at what rate, and how long it still takes."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .display import duration


class Meter:
    """A bar on a terminal; lines where output is piped.

    Args:
        what: is done.
        unit: that its total is counted in.
    """

    def __init__(self, console: Console, what: str, unit: str) -> None:
        self._console, self._unit = console, unit
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(what, total=None, last="")
        self._done, self._total = 0.0, 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, total: float) -> None:
        """Count from now on to a total."""
        self._done, self._total, self._started = 0.0, total, time.monotonic()
        self._show()

    def expect(self, left: float) -> None:
        """Count to another total, of which so much is left."""
        self._total = self._done + left
        self._show()

    def advance(self, amount: float) -> None:
        """Count what was done."""
        self._done += amount
        self._show()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @property
    def rate(self) -> str:
        """How fast it goes, and what is left; empty before anything was done."""
        spent = time.monotonic() - self._started
        if not self._done or not spent:
            return ""
        left = spent * max(self._total - self._done, 0) / self._done
        return f"{self._done / spent:.3g} {self._unit}/s, about {duration(left)} left"

    def _show(self) -> None:
        self._progress.update(self._bar, total=self._total, completed=self._done, last=self.rate)
