"""What a comparison is to do, and what it says while it does."""

from __future__ import annotations

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

    @property
    def base_guidances(self) -> list[float]:
        """What the untrained base is measured at, rising; an evaluation's own guidance is always among them."""
        return sorted({*self.preset.evaluation.guidances, self.preset.evaluation.guidance})

    @property
    def adapter_guidances(self) -> list[float]:
        """What finished adapters are measured at, rising; an evaluation's own guidance is always among them."""
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
        seconds: with as many at once as were asked for, start-up and evaluation included.
        training, sampling: milliseconds a denoiser evaluation, in training (the mean over algorithms) and in sampling.
    """

    runs: int
    seconds: float
    training: float
    sampling: float


class Listener(Protocol):
    """Whoever shows a comparison to a person."""

    def expect(self, forecast: Forecast) -> None:
        """Told once, before the first run starts."""

    def listen(self, event: Event) -> None:
        """Told whenever a run moved on."""


def run_folder(folder: Path, algorithm: str, seed: int) -> Path:
    """Where one run of a comparison lies."""
    return folder / "runs" / f"{algorithm}-seed{seed}"


def base_file(folder: Path) -> Path:
    """The untrained base's metrics, measured once a comparison."""
    return folder / "base.json"


def run_file(folder: Path, algorithm: str, seed: int) -> Path:
    """What says that it is finished."""
    return run_folder(folder, algorithm, seed) / "run.json"
