"""Everything that a comparison's cells have found so far, put into two files: results.json and pictures.csv.gz."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from dgpo_plugin.common.provenance import package_versions
from dgpo_plugin.common.public_names import public_name, without_folders

from .commit import git_hash
from .devices import gpu_names
from .kept import kept_record
from .pictures import KEYS, PICTURES_FILE, Pictures, join, read_pictures, write_pictures
from .plan import Plan, cell_file, run_folder
from .preset import GRAYS, PALETTE
from .prompt_sets import TEST
from .records import (
    BASE,
    KEPT_FOLDER,
    RESULTS_FILE,
    Budget,
    CellRecord,
    EntryRecord,
    MetricRecord,
    Results,
    TaskRecord,
    Trial,
    added_metrics,
    read_record,
    read_results,
    write_record,
)
from .size import CONTROLS
from .written import base_pictures_file, gallery_file, read_base, read_cell

TUNING_FILE = "tuning.json"


class Tuning(BaseModel):
    """A search for settings: what was asked for, written before the first trial, and what was found.

    Attributes:
        evaluations, flops: that a trial may spend on training, in one of the two.
        ranges: that each entry's trials are drawn from.
        trials: all that were drawn, in the order they are done in.
        finished: ``entry:number`` of those that were done; one of them without a value has failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    task: str
    task_version: int
    evaluations: int | None
    flops: float | None = None
    ranges: dict[str, dict[str, Any]]
    trials: list[Trial]
    finished: list[str] = []

    def done(self) -> list[Trial]:
        """The trials that were done."""
        return [trial for trial in self.trials if f"{trial.entry}:{trial.number}" in self.finished]


def read_tuning(file: Path) -> Tuning:
    """A search that was written down.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_record(Tuning, file, "cannot be read; remove it, or run `dgpo-bench tune` again")


def gather(plan: Plan, folder: Path) -> Results:
    """Write results.json and pictures.csv.gz of the base and whatever cells are there.

    Raises:
        UserError: the base or a finished cell cannot be read.
    """
    base = read_base(folder)
    cells, tables = list[CellRecord](), [read_pictures(base_pictures_file(folder))]
    galleries = {BASE: ["base.png"]}
    tuning = read_tuning(folder / TUNING_FILE) if (folder / TUNING_FILE).exists() else None
    for entry in plan.entries:
        for seed in plan.seeds:
            file = cell_file(folder, entry, seed)
            if not file.exists():
                continue
            cells.append(read_cell(file))
            if cells[-1].status == "done":
                tables.append(read_pictures(file.parent / PICTURES_FILE))
                galleries.setdefault(entry, _galleries(folder, entry, seed, len(cells[-1].checkpoints)))
    metrics, table = carried(base.metrics, join(tables), added_metrics(read_results, folder / RESULTS_FILE), folder)
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        preset=plan.preset_name,
        git_hash=commits(cells) or git_hash(),
        packages=package_versions(),
        machine=machine(plan),
        task=task_record(plan),
        sampling=base.sampling,
        budget=Budget(
            size=plan.size_name,
            evaluations=plan.size.evaluations,
            flops=plan.size.flops,
            caution=plan.size.caution,
        ),
        seeds=plan.seeds,
        challenger=plan.challenger,
        entries=entry_records(plan),
        metrics=metrics,
        sets=base.sets,
        base_guidance=base.guidance,
        cells=cells,
        trials=[trial for trial in tuning.done() if trial.entry in plan.entries] if tuning else [],
        ranges=tuning.ranges if tuning else {},
        galleries=galleries,
        gallery_prompts=base.gallery_prompts,
        complete=len(cells) == len(plan.cells),
        kept=kept_record(table, folder / KEPT_FOLDER),
    )
    # The table first: results never speak of cells whose pictures are not there.
    write_pictures(table, folder / PICTURES_FILE)
    write_record(results, folder / RESULTS_FILE)
    return results


def carried(
    metrics: Mapping[str, MetricRecord], pictures: Pictures, added: Mapping[str, MetricRecord], folder: Path
) -> tuple[dict[str, MetricRecord], Pictures]:
    """Newly gathered records and pictures with the metrics that were added to those that lie in the folder.

    A value goes with its picture, by its keys and its file's hash; a picture that is new has none.

    Raises:
        UserError: the pictures there cannot be read.
    """
    if not added or pictures.sha256 is None:
        return dict(metrics), pictures
    old = read_pictures(folder / PICTURES_FILE)
    places = {key: row for row, key in enumerate(_row_keys(old))}
    rows = np.array([places.get(key, -1) for key in _row_keys(pictures)], dtype=np.int64)
    columns = {
        name: np.where(rows >= 0, old.metrics[name][rows], np.nan)
        if name in old.metrics
        else np.full(len(rows), np.nan)
        for name in added
    }
    return {**metrics, **added}, replace(pictures, metrics={**pictures.metrics, **columns})


def _row_keys(pictures: Pictures) -> list[tuple[Any, ...]]:
    """What tells each row from all others, and its picture's file from another of the same place."""
    hashes = [""] * len(pictures) if pictures.sha256 is None else pictures.sha256.tolist()
    return list(zip(*(getattr(pictures, key).tolist() for key in KEYS), hashes, strict=True))


def task_record(plan: Plan) -> TaskRecord:
    """What was asked of every method, as results say it."""
    task = plan.task
    return TaskRecord(
        name=task.name,
        version=task.version,
        headline=task.headline_metric,
        prompts_per_tag=plan.least_prompts(TEST),
        thresholds=list(task.thresholds),
        margin=task.margin,
    )


def entry_records(plan: Plan) -> dict[str, EntryRecord]:
    """The entries with their label, color and settings, without what the comparison decides in their place."""
    records = {}
    own = {color.upper() for color in plan.preset.colors.values()}
    spare = [color for color in PALETTE if color.upper() not in own]
    grays = list(GRAYS)
    model = plan.base_config().model.model_dump(mode="json")
    for entry, path in plan.adapters.items():
        settings = without_folders({"adapter": public_name(path), "model": model})
        color = spare.pop(0) if spare else GRAYS[0]
        records[entry] = EntryRecord(label=entry, color=color, settings=settings)
    for entry in plan.entries if not plan.adapters else ():
        control = entry in CONTROLS
        replaced: Any = {"logging": True, "training": {"iterations", "seed"}, "evaluation": True}
        settings = plan.run_config(entry, plan.seeds[0]).model_dump(mode="json", exclude=replaced)
        label = CONTROLS[entry][0] if control else plan.preset.labels.get(entry, entry)
        color = grays.pop(0) if control else plan.preset.colors.get(entry) or (spare.pop(0) if spare else GRAYS[0])
        kind = "control" if control else "algorithm"
        records[entry] = EntryRecord(label=label, color=color, kind=kind, settings=without_folders(settings))
    return records


def search_ranges(plan: Plan) -> dict[str, dict[str, Any]]:
    """What each entry's trials are drawn from: what all share, and its own on top."""
    search = plan.preset.search
    return {
        entry: {
            key: drawn.model_dump(mode="json", exclude_defaults=True)
            for key, drawn in {**search.get("shared", {}), **search.get(entry, {})}.items()
        }
        for entry in plan.entries
        if entry not in CONTROLS
    }


def commits(cells: Sequence[CellRecord]) -> str:
    """Those that finished cells were made with, mostly one; empty where none says."""
    return ", ".join(sorted({cell.commit for cell in cells if cell.status == "done" and cell.commit}))


def machine(plan: Plan) -> dict[str, str]:
    """The computer, and how much of it each cell had."""
    from dgpo_plugin.distributed.device import processor_name

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": processor_name(),
        "cores": str(os.cpu_count()),
        **({"GPUs": ", ".join(gpus)} if (gpus := gpu_names()) else {}),
        "runs at once": str(plan.jobs),
        "processes of a run": str(plan.processes),
        "threads of a process": str(plan.threads),
    }


def _galleries(folder: Path, entry: str, seed: int, checkpoints: int) -> list[str]:
    """A cell's pictures for the report by checkpoint, the base's first."""
    cell = run_folder(folder, entry, seed)
    return ["base.png", *(gallery_file(cell, n).relative_to(folder).as_posix() for n in range(1, checkpoints))]
