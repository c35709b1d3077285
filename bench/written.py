"""What the processes of a comparison have written so far, and wait for of one another: the base's record, cells'."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .pictures import PICTURES_FILE
from .plan import Plan, base_file, cell_file
from .records import CellRecord, MetricRecord, PromptSetRecord, Sampling, read_record, write_record

MISSING_FILE = "missing.json"
AGAIN = "remove it and start the comparison again"


class MissingRecord(BaseModel):
    """Why optional metrics are missing, by name; none for those that are there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: dict[str, str]


class BaseRecord(BaseModel):
    """What is known once the base is measured.

    Attributes:
        guidance: chosen on the validation prompts.
        denoiser_evaluations: that measuring it took.
        best_of_n: the further pictures of that control are there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float
    metrics: dict[str, MetricRecord]
    sets: dict[str, PromptSetRecord]
    sampling: Sampling
    gallery_prompts: list[str]
    denoiser_evaluations: int
    best_of_n: bool = False


def read_base(folder: Path) -> BaseRecord:
    """What was found of a comparison's base.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_record(BaseRecord, base_file(folder), f"cannot be read; {AGAIN}")


def base_pictures_file(folder: Path) -> Path:
    """Where the base's rows lie."""
    return folder / f"base-{PICTURES_FILE}"


def base_is_measured(plan: Plan, folder: Path) -> bool:
    """Whether :func:`measure_base` has nothing left to do.

    Raises:
        UserError: what it wrote cannot be read.
    """
    return base_file(folder).exists() and (read_base(folder).best_of_n or not plan.best_of_n)


def wait_for(*files: Path) -> None:
    """Wait until one of these is there: the base's process writes them, and its end is the comparison's."""
    while not any(file.exists() for file in files):
        time.sleep(0.2)


def missing_metrics(folder: Path) -> dict[str, str]:
    """Why optional metrics are missing in a comparison, by name; waits for the base's process to have tried them.

    Raises:
        UserError: the file is damaged.
    """
    wait_for(folder / MISSING_FILE, base_file(folder))
    if (folder / MISSING_FILE).exists():
        return read_record(MissingRecord, folder / MISSING_FILE, f"cannot be read; {AGAIN}").metrics
    # A folder of before they were tried apart.
    return {name: metric.missing for name, metric in read_base(folder).metrics.items() if metric.missing}


def read_cell(file: Path) -> CellRecord:
    """A finished or failed cell.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_record(CellRecord, file, "not a finished cell; remove it, and the same command does that cell again")


def write_failed(folder: Path, entry: str, seed: int, reason: str, *, died: bool = False) -> None:
    """Write down that a cell failed and why; what it has saved stays, for it to be tried again."""
    record = CellRecord(entry=entry, seed=seed, status="failed", reason=reason, died=died)
    write_record(record, cell_file(folder, entry, seed))


def gallery_file(folder: Path, checkpoint: int) -> Path:
    """Where a checkpoint's pictures for the report lie, in a cell's folder."""
    return folder / f"gallery-{checkpoint}.png"
