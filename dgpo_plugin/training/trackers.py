"""accelerate's trackers (``logging.trackers``), which go on with the same curve when a run is gone on with.

What each calls the run is kept in the run's folder (``trackers.json``) and given back to it on resume. An exact resume
does the iterations since the last checkpoint again, to the same numbers: a tracker that has them is not told twice, and
TensorBoard, which can take back what it shows, is told anew. The trackers are those of accelerate 1.15
(``accelerate/tracking.py``), which hands the keywords here to each package's own start.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers
from pydantic import TypeAdapter, ValidationError

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import reason, write_text_atomically

PROJECT = "dgpo"
FILE = "trackers.json"
"""In a run's folder: what each tracker calls the run, by the tracker's name."""

NAMED_BY_US: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "wandb": lambda run: {"id": run, "resume": "allow"},
    "trackio": lambda run: {"name": run, "resume": "allow"},
    "swanlab": lambda run: {"id": run[:21], "resume": "allow"},  # its documentation asks for 21 characters
    "comet_ml": lambda run: {"experiment_key": run},  # and that one for 32 to 50
}
"""Trackers that take a name of ours for the run, at its start as when it goes on: keywords by 32 hexadecimal digits."""


@dataclass(frozen=True)
class OwnName:
    """How a tracker that names runs itself is asked for the name, and told it.

    Attributes:
        read: the name, from the package's own run.
        go_on: keywords by the name.
    """

    read: Callable[[Any], str]
    go_on: Callable[[str], dict[str, Any]]


NAMED_BY_THEM: Mapping[str, OwnName] = {
    "mlflow": OwnName(lambda run: run.info.run_id, lambda run: {"run_id": run}),
    "aim": OwnName(lambda run: run.hash, lambda run: {"run_hash": run}),
    # 0 is the offset that it would otherwise add to every iteration's number.
    "clearml": OwnName(lambda task: task.id, lambda run: {"reuse_last_task_id": run, "continue_last_task": 0}),
}


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run, on its first process; none on the others.

    Attributes:
        told: the last iteration that each has been told of before this start, by name; 0 where absent.
    """

    running: tuple[GeneralTracker, ...] = ()
    told: Mapping[str, int] = field(default_factory=dict)

    def log(self, record: dict[str, float], iteration: int) -> None:
        """Tell those that have not been told of the iteration (from 1).

        Raises:
            UserError: one that cannot write.
        """
        for tracker in self.running:
            if iteration > self.told.get(tracker.name, 0):
                with _writes(tracker.name):
                    tracker.log(record, step=iteration)


@contextlib.contextmanager
def _writes(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        which = f"logging.trackers {name}".rstrip()
        raise UserError(f"{which}: cannot write: {reason(error)}; make room, or leave it out") from error


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], folder: Path, done: int, logged: int, config: str
) -> Trackers:
    """Start trackers, or have them go on with what they have of this run.

    Args:
        folder: the run's.
        done: iterations that are not done again.
        logged: the last iteration that was logged before this start.
        config: the run's configuration as text; told once, to a tracker that has nothing of the run.

    Raises:
        UserError: a tracker that is unknown, or cannot be started.
    """
    file = folder / FILE
    before = _read(file) if accelerator.is_main_process else {}
    accelerator.project_configuration.set_directories(str(folder))
    try:
        accelerator.log_with = filter_trackers(list(names), accelerator.logging_dir)
        if missing := {*names} - {"all", *map(str, accelerator.log_with)}:
            raise ImportError(f"no package for {', '.join(sorted(missing))}")
        runs = {str(name): before.get(str(name), "") for name in accelerator.log_with}
        fresh = {name: uuid.uuid4().hex for name in runs if name in NAMED_BY_US}
        runs = {name: run or fresh.get(name, "") for name, run in runs.items()}
        keywords = {name: _keywords(name, run, name in before, folder, done) for name, run in runs.items()}
        with _writes(", ".join(names)):
            accelerator.init_trackers(PROJECT, init_kwargs=keywords)
    except (ImportError, ValueError) as error:
        raise UserError(f"logging.trackers: {error}; install the tracker or leave it out") from error
    running = tuple(accelerator.trackers)
    for tracker in running:
        if tracker.name not in before:
            tracker.store_init_configuration({"config": config})
        if tracker.name in NAMED_BY_THEM:
            runs[tracker.name] = NAMED_BY_THEM[tracker.name].read(tracker.tracker)
    if running:
        write_text_atomically(file, RUNS.dump_json(before | runs, indent=1).decode() + "\n")
    return Trackers(running, {name: logged for name in before if name != "tensorboard"})


@contextlib.contextmanager
def training_ended(accelerator: Accelerator) -> Iterator[None]:
    """End the trackers, and the process group, after the block; what they say then never hides why that failed.

    Raises:
        UserError: the block ended well, and they cannot write.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            accelerator.end_training()
        raise
    with _writes(""):
        accelerator.end_training()


def _keywords(name: str, run: str, goes_on: bool, folder: Path, done: int) -> dict[str, Any]:
    """How a tracker is started for a run that it calls ``run``."""
    if name in NAMED_BY_US:
        return NAMED_BY_US[name](run)
    if name == "dvclive":
        return {"dir": str(folder / name), "resume": goes_on}
    if not goes_on:
        return {}
    if name == "tensorboard":
        return {"purge_step": done + 1}  # the writer has it take back what it shows from there on
    return NAMED_BY_THEM[name].go_on(run) if name in NAMED_BY_THEM else {}


RUNS = TypeAdapter(dict[str, str])


def _read(file: Path) -> dict[str, str]:
    """What is kept of trackers; nothing where it cannot be read, which costs a new curve and no run."""
    try:
        return RUNS.validate_json(file.read_bytes()) if file.exists() else {}
    except (OSError, ValidationError):
        return {}
