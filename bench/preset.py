"""A comparison preset: what all algorithms share, what each has of its own, and how all are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import parse_config, read_yaml

SizeName = Literal["quick", "default", "full"]


class EvaluationPlan(BaseModel):
    """How every run is evaluated, outside its budget.

    Attributes:
        held_out, out_of_domain: prompt sets.
        images_per_prompt: pictures of each prompt; at least two, for diversity.
        steps: of the sampler, for base and adapters alike.
        guidance: of the curves and of the main tables.
        guidances: at which the base is measured besides, and finished adapters where the size says nothing else, since
            a reader can turn that knob.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    held_out: str
    out_of_domain: str
    images_per_prompt: int = Field(4, ge=2)
    steps: int = Field(10, ge=1)
    guidance: float = Field(1.0, ge=1)
    guidances: tuple[Annotated[float, Field(ge=1)], ...] = (1.0, 2.0, 3.0, 4.0)


class Size(BaseModel):
    """How much a comparison spends, in units that mean the same on every machine.

    Attributes:
        evaluations: a run's training budget, in denoiser evaluations.
        seeds: runs of each algorithm.
        prompts_per_task: held-out prompts for each task type, taken in turn from the set.
        out_of_domain_prompts: likewise for each out-of-domain task type.
        schedule: shares of the budget at which to evaluate, rising, besides the start and the end.
        guidances: at which finished adapters are measured besides the evaluation's own; None for all that the base is.
        caution: what a reader must know of results of this size; empty for nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluations: int = Field(ge=1)
    seeds: int = Field(3, ge=1)
    prompts_per_task: int = Field(10, ge=1)
    out_of_domain_prompts: int = Field(25, ge=1)
    schedule: tuple[float, ...] = (0.2, 0.5)
    guidances: tuple[Annotated[float, Field(ge=1)], ...] | None = None
    caution: str = ""

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
    sizes: dict[SizeName, Size]
    notes: dict[str, Any] = {}

    @field_validator("sizes")
    @classmethod
    def _all_sizes(cls, sizes: dict[SizeName, Size]) -> dict[SizeName, Size]:
        missing = [name for name in get_args(SizeName) if name not in sizes]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}; give every size its own training and evaluation")
        return sizes

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
    configs = [preset.run_config(algorithm, 0) for algorithm in preset.algorithms]
    if any(config.model != configs[0].model for config in configs):
        raise UserError(f"{source}: all algorithms must start from one base; write model under shared alone")
    return preset


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, section by section."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
