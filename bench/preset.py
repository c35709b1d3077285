"""A comparison preset: what all algorithms share, what each has of its own, and how all are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dgpo_plugin.config import RunConfig
from dgpo_plugin.config_files import parse_config, read_yaml
from dgpo_plugin.errors import UserError, did_you_mean


class EvaluationPlan(BaseModel):
    """How every run is evaluated, outside its budget.

    Attributes:
        held_out, out_of_domain: prompt sets.
        prompts_per_task: held-out prompts for each task type, taken in turn from the set.
        out_of_domain_prompts: likewise for each out-of-domain task type.
        images_per_prompt: pictures a slot; at least two, for diversity.
        steps, guidance: of the sampler, for base and adapters alike.
        schedule: shares of the budget at which to evaluate, rising, besides the start and the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    held_out: str
    out_of_domain: str
    prompts_per_task: int = Field(10, ge=1)
    out_of_domain_prompts: int = Field(25, ge=1)
    images_per_prompt: int = Field(4, ge=2)
    steps: int = Field(10, ge=1)
    guidance: float = Field(1.0, ge=1)
    schedule: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)

    @field_validator("schedule")
    @classmethod
    def _rising(cls, schedule: tuple[float, ...]) -> tuple[float, ...]:
        if list(schedule) != sorted(set(schedule)) or any(not 0 < share < 1 for share in schedule):
            raise ValueError("must rise and lie between 0 and 1")
        return schedule


class Preset(BaseModel):
    """One comparison. ``algorithms`` maps a name to what it overrides in ``shared``; ``notes`` says where from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    shared: dict[str, Any]
    algorithms: dict[str, dict[str, Any]]
    evaluation: EvaluationPlan
    notes: dict[str, Any] = {}

    def run_config(self, algorithm: str, seed: int) -> RunConfig:
        """The complete configuration of one run."""
        values = _merged(self.shared, self.algorithms[algorithm])
        values.setdefault("training", {})["seed"] = seed
        return parse_config(values, f"preset, algorithm {algorithm}")

    def check_algorithms(self, names: list[str]) -> None:
        for name in names:
            if name not in self.algorithms:
                raise UserError(
                    f"--algorithms: no algorithm {name!r} in the preset{did_you_mean(name, self.algorithms)}"
                )
        if len(set(names)) != len(names):
            raise UserError("--algorithms: names one twice")


def bench_preset_names() -> dict[str, Path]:
    """Shipped comparisons by name."""
    folder = Path(str(resources.files(__package__) / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_preset(source: str) -> Preset:
    """A shipped preset by name, or a YAML file.

    Raises:
        UserError: neither, or the file is not a preset.
    """
    values = read_yaml(source, bench_preset_names(), "comparison preset")
    try:
        preset = Preset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for algorithm in preset.algorithms:
        preset.run_config(algorithm, 0)
    return preset


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, section by section."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
