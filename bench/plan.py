"""What a comparison is to do, and what it says while it does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from dgpo_plugin.common.public_names import public_name
from dgpo_plugin.config.fields import RunConfig

from .preset import NONE, Preset
from .prompt_sets import VALIDATION
from .records import KEPT_FOLDER
from .size import BEST_OF_N, CONTROLS, ControlName, Size, SizeName
from .task import Task


class Plan(BaseModel):
    """What a comparison folder was made for; a folder is only continued by an equal plan.

    Attributes:
        entries: the algorithms and controls that are trained, or the adapters, in the order of the tables.
        adapters: finished adapters' files by entry, where nothing is trained; else empty.
        adapter_sha256: what these files are, by entry.
        keep_pictures: whether every measured picture is kept for metrics of later.
        jobs: runs at once.
        processes: of each run.
        threads: of each process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset_name: str
    preset: Preset
    task: Task
    size_name: SizeName
    size: Size
    entries: list[str]
    adapters: dict[str, str] = {}
    adapter_sha256: dict[str, str] = {}
    best_of_n: bool = False
    seeds: list[int]
    jobs: int
    processes: int = 1
    threads: int
    keep_pictures: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        preset: Preset,
        task: Task,
        size_name: SizeName,
        size: Size,
        algorithms: Sequence[str],
        *,
        jobs: int,
    ) -> Plan:
        """A plan with the size's seeds, from 0 on, that shares the computer's cores among as many runs at once.

        Args:
            name: the preset's.
            jobs: runs at once.
        """
        controls: Sequence[ControlName] = size.controls
        return cls(
            preset_name=name,
            preset=preset,
            task=task,
            size_name=size_name,
            size=size,
            entries=[*algorithms, *(control for control in controls if control != BEST_OF_N)],
            best_of_n=BEST_OF_N in controls,
            seeds=list(range(size.seeds)),
            jobs=jobs,
            threads=threads_each(jobs),
        )

    def spread(self, jobs: int, processes: int) -> Plan:
        """The plan with so many runs at once, of so many processes each, which share the computer's cores."""
        threads = threads_each(jobs * processes)
        return self.model_copy(update={"jobs": jobs, "processes": processes, "threads": threads})

    @property
    def guidance(self) -> float:
        """Guidance of the curves over training."""
        return self.preset.guidance or self.task.sampling.guidance

    @property
    def guidances(self) -> list[float]:
        """What the best guidance is chosen from, rising; the curves' own is always among them."""
        return sorted({*(self.size.guidances or self.task.sampling.guidances), self.guidance})

    def least_prompts(self, name: str) -> int:
        """How many prompts of a kind count for a set's headline: the task's number, or all that the size takes."""
        taken = self.size.validation_prompts if name == VALIDATION else self.size.test_prompts
        return min(self.task.prompts_per_tag, taken)

    @property
    def keeps_best(self) -> bool:
        """Whether cells keep their best checkpoint; a finished adapter has but one."""
        return self.size.best_checkpoint and not self.adapters

    def with_best(self, kept: bool | None) -> Plan:
        """The plan with the best checkpoints or without them; None for what its size says."""
        changed = {} if kept is None else {"best_checkpoint": kept}
        return self.model_copy(update={"size": self.size.model_copy(update=changed)})

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Every (entry, seed), in the order they are started in."""
        return [(entry, seed) for seed in self.seeds for entry in self.entries]

    @property
    def challenger(self) -> str:
        """The entry that all others are compared with."""
        return next(iter(self.adapters), self.preset.challenger)

    @property
    def command(self) -> str:
        """The command that makes this comparison."""
        if self.adapters or not self.entries:
            adapters = [f"--adapter {public_name(path)}" for path in self.adapters.values()]
            given = [f"--guidance {each:g}" for each in self.size.guidances or () if not self._has_own_guidances]
            model = [f"--model {public_name(self.base_config().model.path)}"] if NONE in self.preset.algorithms else []
            parts = [f"dgpo-bench evaluate {self.preset_name} --size {self.size_name}", *model, *given]
            return " ".join([*parts, *(adapters or ["--base"]), *self._running])
        algorithms = [entry for entry in self.entries if entry not in CONTROLS]
        controls = [*(entry for entry in self.entries if entry in CONTROLS), *([BEST_OF_N] if self.best_of_n else [])]
        parts = [f"dgpo-bench compare {self.preset_name} --size {self.size_name} --seeds {len(self.seeds)}"]
        parts += [self.size.budget_option]
        named = "all" if algorithms == list(self.preset.algorithms) else ",".join(algorithms)
        parts += [f"--algorithms {named}"] if algorithms != self.preset.usual else []
        parts += [f"--controls {','.join(controls) or 'none'}"]
        if self.size.best_checkpoint != self.preset.sizes[self.size_name].best_checkpoint:
            parts += ["--best-checkpoint" if self.size.best_checkpoint else "--no-best-checkpoint"]
        return " ".join([*parts, *self._running])

    @property
    def _running(self) -> list[str]:
        """The options of how it runs and what it keeps."""
        processes = [f"--processes {self.processes}"] if self.processes > 1 else []
        return processes + (["--keep-pictures"] if self.keep_pictures else [])

    @property
    def _has_own_guidances(self) -> bool:
        """Whether the guidances are those of the preset's size, rather than the command line's."""
        return self.size.guidances == self.preset.sizes[self.size_name].guidances

    def run_config(self, entry: str, seed: int) -> RunConfig:
        """The complete configuration of one cell's training."""
        return self.preset.run_config(self.task, entry, seed)

    def base_config(self) -> RunConfig:
        """A configuration to measure the base with: that of the first algorithm."""
        trained = [entry for entry in self.entries if entry in self.preset.algorithms]
        return self.run_config((trained or list(self.preset.algorithms))[0], self.seeds[0])


def threads_each(processes: int) -> int:
    """How many threads each of so many processes at once has of this computer's cores."""
    return max(1, (os.cpu_count() or 1) // processes)


@dataclass(frozen=True)
class Event:
    """Something to show while runs are under way.

    Attributes:
        share: of the run that is done, in [0, 1].
        evaluated: the text is an evaluation's.
    """

    run: str
    share: float
    text: str
    evaluated: bool


@dataclass(frozen=True)
class Forecast:
    """What the runs that are missing will take on this machine, from timing each algorithm on it.

    Attributes:
        runs: how many are missing.
        seconds: with as many at once as the plan says, start-up and evaluation included.
        training, sampling: milliseconds per denoiser evaluation, in training (mean over algorithms) and in sampling.
    """

    runs: int
    seconds: float
    training: float
    sampling: float


class Listener(Protocol):
    """Whoever shows a comparison to a person."""

    def expect(self, forecast: Forecast) -> None:
        """Take the forecast, once, as soon as an algorithm was timed."""

    def listen(self, event: Event) -> None:
        """Take an event, whenever a run moved on."""


def run_folder(folder: Path, entry: str, seed: int) -> Path:
    """Where one cell of a comparison lies."""
    return folder / "runs" / f"{entry}-seed{seed}"


def kept_folder(plan: Plan, folder: Path) -> Path | None:
    """Where the pictures of a comparison are kept; None where they are not."""
    return folder / KEPT_FOLDER if plan.keep_pictures else None


def base_file(folder: Path) -> Path:
    """Where what was found of the untrained base lies, measured once per comparison; its pictures are beside it."""
    return folder / "base.json"


def cell_file(folder: Path, entry: str, seed: int) -> Path:
    """Where the result of a cell lies; it is there once the cell is finished, or has failed."""
    return run_folder(folder, entry, seed) / "cell.json"
