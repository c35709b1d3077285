"""How much a comparison spends: its budget, its prompts and pictures, its controls."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dgpo_plugin.common.errors import UserError, did_you_mean

from .task import Guidance

SizeName = Literal["quick", "default", "full"]
ControlName = Literal["zero", "shuffled", "half", "best", "best-of-n"]
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero": ("No reward", {"training": {"control": "zero"}}),
    "shuffled": ("Shuffled rewards", {"training": {"control": "shuffled"}}),
    "half": ("Weight of a half", {"algorithm": {"beta": 1.0e-9}}),
    "best": ("Best of each group", {"training": {"control": "best"}}),
}
"""Controls that are trained: label, and what each changes in the challenger's settings."""
BEST_OF_N = "best-of-n"
"""The control that trains nothing: more pictures of the base, for the best of several at equal inference cost."""
BEST_OF = 8
"""Pictures of a prompt that the best is taken from there."""


class Size(BaseModel):
    """How much a comparison spends, in units that mean the same on every machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluations: int | None = Field(
        None, ge=1, description="The training budget of a run, in denoiser evaluations; or give `flops`."
    )
    flops: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The training budget of a run, in floating-point operations of its denoiser, counted on it; in the "
        "place of `evaluations`.",
    )
    seeds: int = Field(3, ge=1, description="Runs of each algorithm.")
    test_prompts: int = Field(10, ge=1, description="Test prompts of each kind at most, evenly spread over the set.")
    validation_prompts: int = Field(10, ge=1, description="Validation prompts of each kind, likewise.")
    out_of_domain_prompts: int = Field(25, ge=1, description="Prompts of each kind of an out-of-domain set, likewise.")
    curve_prompts: int | None = Field(
        None,
        ge=1,
        description="Of those, test and out-of-domain ones of each kind that are measured at every evaluation during "
        "training; null for all.",
    )
    images_per_prompt: int | None = Field(
        None, ge=1, le=1000, description="Pictures of each prompt; null for the task's."
    )
    base_validation_images: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Validation pictures of each prompt that the base's guidance is chosen on, once for all cells; "
        "null for as many as a cell's.",
    )
    schedule: tuple[float, ...] = Field(
        (0.05, 0.1, 0.2, 0.4, 0.7),
        description="Shares of the budget at which to evaluate, rising, in (0, 1), besides the start and the end.",
    )
    guidances: tuple[Guidance, ...] | None = Field(
        None, description="Guidances that the best is chosen from; null for the task's."
    )
    controls: tuple[ControlName, ...] = Field(
        (), description="Controls besides the algorithms: `zero`, `shuffled`, `half`, `best`, `best-of-n`."
    )
    best_checkpoint: bool = Field(
        False,
        description="Whether every cell's best checkpoint is kept and measured too: that of the highest headline on "
        "validation prompts, which are then measured at every evaluation.",
    )
    caution: str = Field("", description="What a reader must know of results of this size; empty for nothing.")

    @property
    def budget(self) -> float:
        """What a run may spend on training, in the unit that it is given in."""
        budget = self.evaluations if self.flops is None else self.flops
        assert budget is not None  # or there were no such size
        return budget

    @property
    def budget_option(self) -> str:
        """The budget as a command line has it."""
        return f"--evaluations {self.evaluations}" if self.flops is None else f"--flops {_written(self.flops)}"

    @model_validator(mode="after")
    def _one_budget(self) -> Size:
        if (self.evaluations is None) == (self.flops is None):
            raise ValueError("give the budget as evaluations, or as flops")
        return self

    @field_validator("schedule")
    @classmethod
    def _rising(cls, schedule: tuple[float, ...]) -> tuple[float, ...]:
        if list(schedule) != sorted(set(schedule)) or any(not 0 < share < 1 for share in schedule):
            raise ValueError("must rise and lie between 0 and 1")
        return schedule

    def changed(self, seeds: int | None, evaluations: int | None, controls: str | None, flops: float | None) -> Size:
        """The size with other seeds, another budget or other controls where they are given.

        Args:
            evaluations, flops: the budget, in one of the two.
            controls: names, comma-separated; ``all``, ``none``.

        Raises:
            UserError: no such control, a budget of nothing, or two of them.
        """
        if evaluations is not None and evaluations <= 0:
            raise UserError(f"--evaluations {evaluations}: must be more than nothing")
        if flops is not None and not 0 < flops < math.inf:
            raise UserError(f"--flops {flops:g}: must be more than nothing, and a number")
        if flops is not None and evaluations is not None:
            raise UserError("--flops, --evaluations: the budget is one of the two; leave the other out")
        chosen = None if controls is None else _controls(controls)
        changes: dict[str, Any] = {"seeds": seeds, "controls": chosen}
        changes = {key: value for key, value in changes.items() if value is not None}
        if flops is not None or evaluations is not None:
            changes |= {"evaluations": evaluations, "flops": flops}
        return self.model_copy(update=changes)


def _written(number: float) -> str:
    """A number as a person writes it, if that is the same number."""
    short = f"{number:g}".replace("e+", "e")
    return short if float(short) == number else repr(number)


def _controls(text: str) -> tuple[str, ...]:
    """Controls that a command line names."""
    known = (*CONTROLS, BEST_OF_N)
    names = known if text == "all" else () if text == "none" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"--controls: no control {name!r}{did_you_mean(name, known)}; or all, or none")
    return tuple(name for name in known if name in names)
