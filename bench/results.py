"""The result files of a comparison: typed schemas, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import read_bytes, read_text, write_text_atomically
from dgpo_plugin.config.explain import explain

SCHEMA_VERSION = 3


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Record):
    """What one number of an evaluation means.

    Attributes:
        label: for tables and axes.
        domain: ``in`` for what was optimized (on held-out prompts), ``out`` for everything else.
        better: which way is good; ``none`` for a statistic that should merely stay where the base has it.
        description: one sentence for the reader of the report.
    """

    label: str
    domain: Literal["in", "out"]
    better: Literal["higher", "lower", "none"]
    description: str


class Evaluation(_Record):
    """One evaluation of one run, taken outside the budget.

    Attributes:
        iteration: training iterations done.
        seconds: training seconds spent so far (rollout, reward, training; no evaluation, no start-up).
        denoiser_evaluations: images through the denoiser so far (a backward counts two).
        metrics: values by metric name (the keys of ``Results.metrics``).
    """

    iteration: int
    seconds: FiniteFloat
    denoiser_evaluations: int
    metrics: dict[str, FiniteFloat]


class Guided(_Record):
    """All metrics of the base or of a finished adapter, sampled with one guidance."""

    guidance: FiniteFloat
    metrics: dict[str, FiniteFloat]


class Run(_Record):
    """One algorithm with one seed. The first evaluation is of the untrained base.

    Attributes:
        guided: of the finished adapter, at every guidance of the preset, rising.
    """

    algorithm: str
    seed: int
    evaluations: list[Evaluation]
    guided: list[Guided] = []
    adapter: str


class Base(_Record):
    """The untrained base, measured once per comparison, and what the report shows pictures of.

    Attributes:
        guided: all metrics at every guidance of the preset, rising.
        tasks: task types of the held-out prompts.
    """

    guided: list[Guided]
    tasks: list[str]
    gallery_prompts: list[str]


class Budget(_Record):
    """What every run was given, in units that mean the same on every machine.

    Attributes:
        size: the preset's name for it.
        evaluations: denoiser evaluations of training.
        caution: what a reader must know of results of this size.
    """

    size: str
    evaluations: int
    caution: str = ""


class Results(_Record):
    """Everything that a report is drawn from.

    Attributes:
        challenger: the algorithm that all others are compared with; it may be missing from ``algorithms``.
        labels: names of algorithms for people.
        colors: of algorithms in the report, ``#RRGGBB``.
        metrics: the meaning of every metric name, in the order of the report's tables.
        primary: the metric the verdict and the time-to-threshold are about.
        base: the untrained base at every guidance of the preset, rising.
        settings: the full configuration of each algorithm, as in its run's ``config.yaml``.
        gallery: PNG files beside ``results.json`` by name (``base`` and every algorithm): the same held-out
            prompts and noise, one row of tiles, captions in ``gallery_prompts``.
        complete: false while runs are missing.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    preset: str
    git_hash: str | None
    packages: dict[str, str]
    machine: dict[str, str]
    budget: Budget
    seeds: list[int]
    algorithms: list[str]
    challenger: str
    labels: dict[str, str] = {}
    colors: dict[str, str] = {}
    metrics: dict[str, Metric]
    primary: str
    settings: dict[str, dict[str, Any]]
    base: list[Guided] = []
    runs: list[Run]
    gallery: dict[str, str] = {}
    gallery_prompts: list[str] = []
    complete: bool

    @model_validator(mode="after")
    def _runs_are_those_of_the_comparison(self) -> Results:
        seen: set[tuple[str, int]] = set()
        for run in self.runs:
            name = f"run {run.algorithm}, seed {run.seed}"
            if run.algorithm not in self.algorithms or run.seed not in self.seeds:
                raise ValueError(f"{name}: the comparison has no such algorithm or seed")
            if (run.algorithm, run.seed) in seen:
                raise ValueError(f"{name}: stands there twice")
            seen.add((run.algorithm, run.seed))
        return self

    def label(self, algorithm: str) -> str:
        """An algorithm's name for people: the preset's label, or the name as it is."""
        return self.labels.get(algorithm, algorithm)


def write_results(results: Results, path: Path) -> None:
    """Write the result file, whole or not at all."""
    write_text_atomically(path, results.model_dump_json(indent=1) + "\n")


def read_results(path: Path) -> Results:
    """Everything that a comparison has found so far.

    Raises:
        UserError: the file is missing, is not JSON, is of another schema, or holds runs that are not the comparison's,
            one twice, or numbers that are not finite.
    """
    try:
        record = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"results file {path}: {error.strerror}; name a folder made by `dgpo-bench compare`") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"results file {path}: not JSON ({error}); run `dgpo-bench compare` again") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"results file {path}: schema version {version}, this program reads {SCHEMA_VERSION}")
    try:
        return Results.model_validate(record)
    except ValidationError as error:
        raise UserError(f"results file {path}: {explain(error, Results, record)}") from error


def read_base(file: Path) -> Base:
    """The untrained base's measurements.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return Base.model_validate_json(read_bytes(file))
    except (OSError, ValidationError) as error:
        raise UserError(f"{file}: cannot be read; remove it and start the comparison again") from error


def read_run(file: Path) -> Run:
    """A finished run.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return Run.model_validate_json(read_bytes(file))
    except (OSError, ValidationError) as error:
        raise UserError(f"{file}: not a finished run; remove it, and the same command does that run again") from error
