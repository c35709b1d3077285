"""What a sweep is asked for and what it writes down: its plan, its settings, ``sweep.json``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.public_names import public_name

from .plan import Plan
from .preset import NONE
from .records import KeptRecord, Versioned, read_record, read_versioned

SCHEMA_VERSION = 1
SWEEP_FILE = "sweep.json"
START_FILE = "start.json"
"""What was found before anything was measured; every sweep's folder has it."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STEPS = (10, 20, 40)
MOST_STEPS = 1000
"""What schedules of diffusers' pipelines are made of; they have no finer one."""
Axis = Literal["strength", "steps", "guidance"]


class Setting(BaseModel):
    """What pictures are drawn with; strength 0 is the untrained base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: FiniteFloat = Field(ge=0)
    steps: int = Field(ge=1)
    guidance: FiniteFloat

    @property
    def entry(self) -> str:
        """What its pictures are under in the table, beside their guidance."""
        return f"strength {plain(self.strength)}, {self.steps} steps"

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"strength{plain(self.strength)}-steps{self.steps}-guidance{plain(self.guidance)}"

    def base(self) -> Setting:
        """The untrained base with the same steps and guidance."""
        return self.model_copy(update={"strength": 0.0})

    def at(self, axis: Axis, value: float) -> Setting:
        """The same with another value on one axis."""
        return self.model_copy(update={axis: int(value) if axis == "steps" else float(value)})

    def on(self, axis: Axis) -> float:
        """Its value on an axis."""
        return {"strength": self.strength, "steps": float(self.steps), "guidance": self.guidance}[axis]


class SweepPlan(BaseModel):
    """What a sweep's folder was made for; a folder is only continued by an equal plan.

    Attributes:
        plan: the task, the model and how pictures are measured.
        adapter: its file.
        label: what it is called.
        adapter_sha256: of its content, without the header.
        strengths, steps, guidances: what is tried on each axis, rising.
        prompts: of each set at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Plan
    adapter: str
    label: str
    adapter_sha256: str
    strengths: list[float]
    steps: list[int]
    guidances: list[float]
    prompts: int

    def center(self, guidance: float) -> Setting:
        """Where the axes cross: strength 1, the task's steps, and a guidance; or what is tried nearest to them."""
        strengths = [each for each in self.strengths if each]
        strength = min(strengths, key=lambda each: abs(each - 1))
        steps = min(self.steps, key=lambda each: abs(each - self.plan.task.sampling.steps))
        return Setting(strength=strength, steps=steps, guidance=guidance)

    def values(self, axis: Axis) -> list[float]:
        """What is tried on an axis; of strengths without 0, which is the base."""
        found: dict[Axis, list[float]] = {
            "strength": [each for each in self.strengths if each],
            "steps": [float(each) for each in self.steps],
            "guidance": self.guidances,
        }
        return found[axis]

    def on_axis(self, axis: Axis, center: Setting) -> list[Setting]:
        """The settings of an axis, each with the base's beside it, once."""
        tried = [center.at(axis, value) for value in self.values(axis)]
        return list(dict.fromkeys(each for one in tried for each in (one.base(), one)))

    @property
    def command(self) -> str:
        """The command that makes this sweep."""
        model = self.plan.base_config().model.path
        parts = [f"dgpo-bench sweep {self.plan.preset_name} --adapter {public_name(self.adapter)}"]
        parts += [f"--model {public_name(model)}"] if NONE in self.plan.preset.algorithms else []
        for option, values in (("strengths", self.strengths), ("steps", self.steps), ("guidances", self.guidances)):
            parts.append(f"--{option} {','.join(plain(each) for each in values)}")
        parts.append(f"--prompts {self.prompts}")
        return " ".join([*parts, *(["--keep-pictures"] if self.plan.keep_pictures else [])])


class SweepRecord(Versioned):
    """Everything that a sweep's page is drawn from, but the pictures' table.

    Attributes:
        sampling: of the center; its guidances are the axis.
        adapter: what it is called.
        cautions: what a reader must know of the adapter: that its scale is unknown, or whether this is its base.
        axes: what was tried.
        center: where they cross.
        base_guidance: of the untrained base, the best of the axis by the headline.
        settings: those that are measured, by ``entry`` and guidance of the pictures' table.
        denoiser_evaluations: that they took.
        galleries: PNG files beside it by :attr:`Setting.name`: the same prompts and noise, one row of tiles.
        complete: false while settings are missing.
    """

    schema_version: int = SCHEMA_VERSION
    adapter: str
    adapter_sha256: str
    cautions: list[str] = Field([])
    axes: dict[Axis, list[FiniteFloat]]
    center: Setting
    base_guidance: FiniteFloat
    settings: list[Setting] = Field(min_length=1)
    denoiser_evaluations: int
    galleries: dict[str, str] = Field({})
    gallery_prompts: list[str] = Field([])
    complete: bool
    kept: KeptRecord | None = None


def plain(value: float) -> str:
    """A number as people write it: 1 and 0.25."""
    return repr(float(value)).removesuffix(".0")


def parse_axis(option: str, text: str, kind: Callable[[str], float], low: float, high: float) -> list[float]:
    """The values that an option lists, comma-separated, rising.

    Args:
        kind: what reads one; raises ValueError.
        low, high: between which they lie.

    Raises:
        UserError: one is no number, too small or too large, or stands there twice.
    """
    values = []
    wanted = "whole numbers" if kind is int else "numbers"
    bounds = f"from {low:g} on" if math.isinf(high) else f"from {low:g} to {high:g}"
    for part in text.split(","):
        try:
            value = kind(part.strip())
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise UserError(f"{option} {text}: {part.strip()!r} is none of the {wanted} {bounds}, comma-separated")
        values.append(value + 0.0 if kind is float else value)  # -0 is 0
    if len(set(values)) < len(values):
        raise UserError(f"{option} {text}: names one twice")
    return sorted(values)


def sweep_plan_of(folder: Path) -> SweepPlan | None:
    """The plan that a folder was made for; None where it has none.

    Raises:
        UserError: it cannot be read, or is a comparison's.
    """
    file = folder / "plan.json"
    return read_record(SweepPlan, file, "not a sweep's plan; choose another --output") if file.exists() else None


def read_sweep(folder: Path) -> SweepRecord:
    """What a sweep found.

    Raises:
        UserError: as :func:`~dgpo_bench.records.read_versioned`, or its headline is none of its metrics.
    """
    path = folder / SWEEP_FILE
    found = read_versioned(SweepRecord, path, f"sweep {path}", "dgpo-bench sweep")
    if found.task.headline not in found.metrics:
        raise UserError(f"sweep {path}: the headline {found.task.headline!r} is none of its metrics")
    return found
