"""What a comparison is to do, and what it says while it does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from .preset import Preset, Size, SizeName


class Plan(BaseModel):
    """What a comparison folder was made for; a folder is only continued by an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset_name: str
    preset: Preset
    size_name: SizeName
    size: Size
    algorithms: list[str]
    seeds: list[int]
    jobs: int
    threads: int

    @classmethod
    def of(
        cls, name: str, preset: Preset, size_name: SizeName, size: Size, algorithms: Sequence[str], *, jobs: int
    ) -> Plan:
        """A plan with the size's seeds, from 0 on, that shares the computer's cores among as many runs at once.

        Args:
            name: the preset's.
            jobs: runs at once.
        """
        threads = max(1, (os.cpu_count() or 1) // jobs)
        return cls(
            preset_name=name,
            preset=preset,
            size_name=size_name,
            size=size,
            algorithms=list(algorithms),
            seeds=list(range(size.seeds)),
            jobs=jobs,
            threads=threads,
        )

    @property
    def base_guidances(self) -> list[float]:
        """Guidances of the untrained base, rising; an evaluation's own is always among them."""
        return sorted({*self.preset.evaluation.guidances, self.preset.evaluation.guidance})

    @property
    def adapter_guidances(self) -> list[float]:
        """Guidances of finished adapters, rising; an evaluation's own is always among them."""
        if self.size.guidances is None:
            return self.base_guidances
        return sorted({*self.size.guidances, self.preset.evaluation.guidance})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every (algorithm, seed), in the order they are started in."""
        return [(algorithm, seed) for seed in self.seeds for algorithm in self.algorithms]


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
        """Take the forecast, once, before the first run starts."""

    def listen(self, event: Event) -> None:
        """Take an event, whenever a run moved on."""


def run_folder(folder: Path, algorithm: str, seed: int) -> Path:
    """Where one run of a comparison lies."""
    return folder / "runs" / f"{algorithm}-seed{seed}"


def base_file(folder: Path) -> Path:
    """Where the untrained base's metrics lie, measured once per comparison."""
    return folder / "base.json"


def run_file(folder: Path, algorithm: str, seed: int) -> Path:
    """Where the result of a run lies; it is there once the run is finished."""
    return run_folder(folder, algorithm, seed) / "run.json"
