"""What a person sees of a comparison: how long it will take here, a bar per run, and how long it still takes."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .plan import Event, Forecast


class Display:
    """Bars on a terminal; a line per evaluation (and the first iteration) where output is piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._shares: dict[str, float] = {}
        self._first_shares: dict[str, float] = {}
        self._all_runs: TaskID | None = None
        self._forecast: Forecast | None = None
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, forecast: Forecast) -> None:
        """Say what the runs will take, and count the time from now."""
        self._forecast, self._started = forecast, time.monotonic()
        self._say(
            f"{forecast.runs} {'run' if forecast.runs == 1 else 'runs'}, about {duration(forecast.seconds)} here "
            f"(measured: {forecast.training:.2g} ms per denoiser evaluation in training, "
            f"{forecast.sampling:.2g} ms in sampling)"
        )
        self._all_runs = self._progress.add_task("all runs", total=forecast.runs, last="")

    def listen(self, event: Event) -> None:
        """Move a run's bar, and print its line where there is one to print."""
        if event.run not in self._tasks:
            self._tasks[event.run] = self._progress.add_task(event.run, total=1.0, last="")
        self._first_shares.setdefault(event.run, event.share)
        self._shares[event.run] = event.share
        left = self._left()
        self._progress.update(self._tasks[event.run], completed=event.share, last=event.text)
        if self._all_runs is not None:
            self._progress.update(self._all_runs, completed=sum(self._shares.values()), last=left)
        if event.evaluated or (not self._console.is_terminal and event.text.startswith("iteration 1,")):
            self._say(f"{event.run:<22} {event.share:4.0%}  {event.text}  {left}".rstrip())

    def _left(self) -> str:
        """The time left, from what has been done since the start, or from the forecast while that is too little."""
        if self._forecast is None:
            return ""
        done = sum(self._shares[run] - self._first_shares[run] for run in self._shares)
        todo = self._forecast.runs - sum(self._first_shares.values())
        spent = time.monotonic() - self._started
        left = self._forecast.seconds - spent
        if todo > 0 and done / todo > 0.1:
            left = spent * (todo - done) / done
        return f"(about {duration(max(left, 0.0))} left)"

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in whole minutes from two on, else in seconds."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
