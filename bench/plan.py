"""What a comparison is to do, and what it says while it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .preset import Preset
from .results import Budget


class Plan(BaseModel):
    """What a comparison folder was made for; a folder is only continued by an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset_name: str
    preset: Preset
    algorithms: list[str]
    seeds: list[int]
    budget: Budget
    jobs: int
    threads: int


@dataclass(frozen=True)
class Event:
    """Something to show while runs are under way."""

    run: str
    share: float
    text: str
    evaluated: bool


Listener = Callable[[Event], None]


def run_folder(folder: Path, algorithm: str, seed: int) -> Path:
    """Where one run of a comparison lies."""
    return folder / "runs" / f"{algorithm}-seed{seed}"


def run_file(folder: Path, algorithm: str, seed: int) -> Path:
    """What says that it is finished."""
    return run_folder(folder, algorithm, seed) / "run.json"
