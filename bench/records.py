"""What a comparison writes down: typed records, beside a table with a row a picture (pictures).

``results.json`` is a :class:`Results`; ``pictures.csv.gz`` holds what was measured. A report is a function of the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dgpo_plugin.common.errors import UserError, is_unicode
from dgpo_plugin.common.files import read_bytes, read_text, write_text_atomically
from dgpo_plugin.config.explain import explain

SCHEMA_VERSION = 5
BASE = "base"
"""The entry that the untrained base's pictures are under, with seed :data:`NO_SEED` and checkpoint 0."""
NO_SEED = -1
RESULTS_FILE = "results.json"
KEPT_FOLDER = "kept"
"""Where pictures that are kept lie, beside the results."""

R = TypeVar("R", bound=BaseModel)
V = TypeVar("V", bound="Versioned")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricRecord(_Record):
    """What one column of the pictures' table means.

    Attributes:
        label: for tables and axes.
        description: one sentence for the reader of the report.
        better: which way is good; ``none`` for a statistic that should merely stay where the base has it.
        relation: to what was trained on: the reward itself (``trained``), a metric that learnt from the same preference
            data (``same data``), one that is neither (``untrained``), or a statistic of pictures.
        version: of its computation; results whose versions differ are not put into one table.
        weights: the hash of its network's weights; None where it has none.
        missing: why it could not be measured (a server that is not there); empty where it was.
        added: when it was computed of kept pictures, at 8 bits a channel, after the comparison had been made; empty
            where it was computed with it.
    """

    label: str
    description: str
    better: Literal["higher", "lower", "none"]
    relation: Literal["trained", "same data", "untrained", "statistic"]
    version: str
    weights: str | None = None
    missing: str = ""
    added: str = ""


class PromptRecord(_Record):
    """A prompt of a set; its tag is the kind of prompt that accuracy is split by, empty for none."""

    text: str
    tag: str = ""


class PromptSetRecord(_Record):
    """The prompts of one set that were sampled, in order.

    Attributes:
        role: ``validation`` (guidance and settings are chosen on it, nothing is reported from it),
            ``in_domain`` (the test prompts of the kind that is trained on) or ``out_of_domain`` (another kind).
        images_per_prompt: pictures of each, from noises 0 to that, the same for every cell.
    """

    role: Literal["validation", "in_domain", "out_of_domain"]
    prompts: list[PromptRecord] = Field(min_length=1)
    images_per_prompt: int = Field(ge=1)


class TaskRecord(_Record):
    """What was asked of every method.

    Attributes:
        headline: the metric that verdicts are about.
        prompts_per_tag: a tag counts for the headline if it has at least so many prompts in its set; one that has fewer
            is shown beside it.
        thresholds: values of the headline, rising, that the time to is measured for; the same for all.
        margin: of "not worse out of domain", in units of the headline.
    """

    name: str
    version: int
    headline: str
    prompts_per_tag: int = 1
    thresholds: list[FiniteFloat] = []
    margin: FiniteFloat = 0.02


class Sampling(_Record):
    """How every picture was sampled; results that differ in it are not put into one table.

    Attributes:
        guidance: of the curves, at every checkpoint.
        guidances: that the best is chosen from on the validation prompts, rising.
    """

    sampler: str
    steps: int
    guidance: FiniteFloat
    guidances: list[FiniteFloat]
    precision: str
    width: int
    height: int


class Checkpoint(_Record):
    """What a cell had cost when it was evaluated, all since its start; the first one is the untrained base's.

    Attributes:
        steps: optimizer steps.
        denoiser_evaluations: images through the denoiser (a backward counts two).
        flops: measured floating-point operations of the denoiser; None where they were not counted.
        images_scored: pictures that the reward saw.
        seconds: by part (``rollout``, ``reward``, ``training``, ...), without evaluation and start-up.
        drift: mean squared velocity difference from the base on its own pictures.
    """

    iteration: int
    steps: int
    denoiser_evaluations: int
    flops: FiniteFloat | None = None
    images_scored: int
    seconds: dict[str, FiniteFloat]
    drift: FiniteFloat | None = None

    @property
    def total_seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())


class BestCheckpoint(_Record):
    """A cell's checkpoint with the highest headline on validation prompts at the curves' guidance; of equal the first.

    Attributes:
        checkpoint: an index into the cell's; never the untrained base's.
        guidance: chosen for it on the validation prompts.
        adapter: path beside ``results.json``.
    """

    checkpoint: int = Field(ge=1)
    guidance: FiniteFloat
    adapter: str


class CellRecord(_Record):
    """One entry with one seed.

    Attributes:
        status: ``failed`` is a result too, with its ``reason``.
        died: it failed because a process that did it is gone; the same command goes on with it.
        checkpoints: in the order of training; a picture's ``checkpoint`` is an index into it.
        guidance: of the finished adapter, chosen on the validation prompts; None before that.
        best: its best checkpoint, measured as the last is; None where that was not asked for.
        processes: that trained and measured it together, at its end.
        peak_memory: bytes on the process that had most; None where it was not measured.
        evaluation_seconds: spent on measuring, outside the budget.
        adapter: path beside ``results.json``; empty where there is none.
        alarms: what ``training.guard`` said of it, a sentence for each.
        commit: that it was finished with, as :func:`dgpo_bench.commit.git_hash` says it.
    """

    entry: str
    seed: int
    status: Literal["done", "failed"]
    reason: str = ""
    died: bool = False
    checkpoints: list[Checkpoint] = []
    guidance: FiniteFloat | None = None
    best: BestCheckpoint | None = None
    processes: int = 1
    peak_memory: int | None = None
    evaluation_seconds: FiniteFloat = 0.0
    adapter: str = ""
    alarms: list[str] = []
    commit: str | None = None


class EntryRecord(_Record):
    """A method of the comparison: an algorithm with its settings, or a control.

    Attributes:
        settings: the full configuration, without what the comparison decides in its place.
    """

    label: str
    color: str
    kind: Literal["algorithm", "control"] = "algorithm"
    settings: dict[str, Any]


class Trial(_Record):
    """One setting that was tried for an entry before the comparison, on validation prompts and a seed from 100 on."""

    entry: str
    number: int
    settings: dict[str, Any]
    value: FiniteFloat | None
    denoiser_evaluations: int


class Budget(_Record):
    """What every cell was given, in units that mean the same on every machine.

    Attributes:
        size: the preset's name for it.
        evaluations: denoiser evaluations of training; None where it was given in operations.
        flops: floating-point operations of the denoiser in training; None where it was given in evaluations.
        caution: what a reader must know of results of this size.
    """

    size: str
    evaluations: int | None = None
    flops: FiniteFloat | None = None
    caution: str = ""

    @model_validator(mode="after")
    def _in_one_unit(self) -> Budget:
        if (self.evaluations is None) == (self.flops is None):
            raise ValueError("is in evaluations or in flops, one of the two")
        return self

    def __str__(self) -> str:
        if self.flops is None:
            return f"{self.evaluations:,} denoiser evaluations"
        return f"{self.flops:.3g} measured floating-point operations"


class KeptRecord(_Record):
    """The pictures that were kept for metrics of later: how many, and what their files take."""

    pictures: int = Field(ge=1)
    megabytes: FiniteFloat = Field(ge=0)


class Versioned(_Record):
    """What a page is drawn from, but the pictures' table: where it was made, and what its columns mean.

    Attributes:
        command: that made it.
        metrics: by name, in the order of the tables.
        sets: the prompt sets by name.
    """

    schema_version: int
    created: str
    command: str
    preset: str
    git_hash: str | None
    packages: dict[str, str]
    machine: dict[str, str]
    task: TaskRecord
    sampling: Sampling
    metrics: dict[str, MetricRecord]
    sets: dict[str, PromptSetRecord]

    @classmethod
    def readable(cls) -> int:
        """The version of the schema that this program writes and reads."""
        return int(cls.model_fields["schema_version"].default)


class Results(Versioned):
    """Everything that a report is drawn from, but the pictures' table.

    Attributes:
        challenger: the entry that all others are compared with; it may be missing from the cells.
        entries: by name, in the order of the tables.
        base_guidance: of the untrained base, chosen on the validation prompts.
        ranges: what each entry's trials were drawn from, written before the first: dotted key to its range.
        galleries: PNG files beside ``results.json``, by entry (``base`` too), one a checkpoint: the same prompts and
            noise, one row of tiles, captions in ``gallery_prompts``.
        complete: false while cells are missing.
        kept: the pictures that were kept; None for none.
    """

    schema_version: int = SCHEMA_VERSION
    budget: Budget
    seeds: list[int]
    challenger: str
    entries: dict[str, EntryRecord]
    base_guidance: FiniteFloat | None = None
    cells: list[CellRecord] = []
    trials: list[Trial] = []
    ranges: dict[str, dict[str, Any]] = {}
    galleries: dict[str, list[str]] = {}
    gallery_prompts: list[str] = []
    complete: bool
    kept: KeptRecord | None = None

    @model_validator(mode="after")
    def _cells_are_those_of_the_comparison(self) -> Results:
        seen: set[tuple[str, int]] = set()
        for cell in self.cells:
            name = f"cell {cell.entry}, seed {cell.seed}"
            if cell.entry not in self.entries or cell.seed not in self.seeds:
                raise ValueError(f"{name}: the comparison has no such entry or seed")
            if (cell.entry, cell.seed) in seen:
                raise ValueError(f"{name}: stands there twice")
            if cell.best is not None and cell.best.checkpoint >= len(cell.checkpoints):
                raise ValueError(f"{name}: its best checkpoint is none of its own")
            seen.add((cell.entry, cell.seed))
        if self.task.headline not in self.metrics:
            raise ValueError(f"task.headline {self.task.headline!r} is not among the metrics {list(self.metrics)}")
        return self

    def cells_of(self, entry: str) -> dict[int, CellRecord]:
        """The finished cells of one entry by seed, in the order of ``seeds``."""
        found = {cell.seed: cell for cell in self.cells if cell.entry == entry and cell.status == "done"}
        return {seed: found[seed] for seed in self.seeds if seed in found}


def passes(steps: int, guidance: float) -> int:
    """Denoiser evaluations of one picture: one a step, two with guidance."""
    return steps * (1 if guidance == 1 else 2)


def write_record(record: BaseModel, file: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    write_text_atomically(file, record.model_dump_json(indent=1) + "\n")


def read_record(kind: type[R], file: Path, otherwise: str) -> R:
    """A record that :func:`write_record` wrote.

    Args:
        otherwise: what is said of a file that is missing or damaged.

    Raises:
        UserError: it is.
    """
    try:
        return kind.model_validate_json(read_bytes(file))
    except (OSError, ValidationError) as error:
        raise UserError(f"{file}: {otherwise}") from error


def read_results(path: Path) -> Results:
    """Everything that a comparison has found so far, but the pictures' table.

    Raises:
        UserError: as :func:`read_versioned`; or it holds cells that are not the comparison's, or one twice.
    """
    return read_versioned(Results, path, f"results file {path}", "dgpo-bench compare")


def read_versioned(kind: type[V], path: Path, called: str, command: str) -> V:
    """What a page is drawn from, as a command wrote it.

    Args:
        called: what the file is, with its place, as messages begin.
        command: that writes such a file.

    Raises:
        UserError: the file is missing, is not JSON, is of another schema, or holds half of a character, what such a
            file does not have, or numbers that are not finite.
    """
    try:
        record = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{called}: {error.strerror}; name a folder made by `{command}`") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{called}: not JSON ({error}); run `{command}` again") from error
    if not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise UserError(f"{called}: holds half of a character; run `{command}` again")
    version, readable = record.get("schema_version") if isinstance(record, dict) else None, kind.readable()
    if version != readable:
        raise UserError(f"{called}: schema version {version}, this program reads {readable}")
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise UserError(f"{called}: {explain(error, kind, record)}") from error


def added_metrics(read: Callable[[Path], Versioned], place: Path) -> dict[str, MetricRecord]:
    """The metrics that were added later to what lies at a place; none where it cannot be read.

    Args:
        read: it, or raises UserError.
    """
    try:
        metrics = read(place).metrics
    except UserError:
        return {}
    return {name: record for name, record in metrics.items() if record.added}
