"""A comparison preset: what all algorithms share, what each has of its own, and how all are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.user_file import is_from_file, remember_origin, tell_of
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import parse_config, read_yaml

SizeName = Literal["quick", "default", "full"]


Guidance = Annotated[float, Field(ge=1)]
Color = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]


class EvaluationPlan(BaseModel):
    """How every run is evaluated, outside its budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    held_out: str = Field(description="Prompt set of the kind that is trained on, none of which is.")
    out_of_domain: str = Field(description="Prompt set of another kind.")
    images_per_prompt: int = Field(4, ge=2, description="Pictures of each prompt; at least two, for diversity.")
    steps: int = Field(10, ge=1, description="Steps of the sampler, for base and adapters alike.")
    guidance: Guidance = Field(1.0, description="Guidance of the curves and of the main tables.")
    guidances: tuple[Guidance, ...] = Field(
        (1.0, 2.0, 3.0, 4.0),
        description="Guidances at which the base is measured besides, and finished adapters too unless the size has "
        "its own: a reader can turn that knob.",
    )


class Size(BaseModel):
    """How much a comparison spends, in units that mean the same on every machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluations: int = Field(ge=1, description="The training budget of a run, in denoiser evaluations.")
    seeds: int = Field(3, ge=1, description="Runs of each algorithm.")
    prompts_per_task: int = Field(
        10, ge=1, description="Held-out prompts for each task type, taken in turn from the set."
    )
    out_of_domain_prompts: int = Field(
        25, ge=1, description="Prompts for each out-of-domain task type, in turn likewise."
    )
    schedule: tuple[float, ...] = Field(
        (0.2, 0.5),
        description="Shares of the budget at which to evaluate, rising, in (0, 1), besides the start and the end.",
    )
    guidances: tuple[Guidance, ...] | None = Field(
        None,
        description="Guidances at which finished adapters are measured besides the evaluation's own; null for all that "
        "the base is.",
    )
    caution: str = Field("", description="What a reader must know of results of this size; empty for nothing.")

    @field_validator("schedule")
    @classmethod
    def _rising(cls, schedule: tuple[float, ...]) -> tuple[float, ...]:
        if list(schedule) != sorted(set(schedule)) or any(not 0 < share < 1 for share in schedule):
            raise ValueError("must rise and lie between 0 and 1")
        return schedule


class Preset(BaseModel):
    """One comparison: algorithms, what they share, what each has of its own, and how all are evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field(description="One line for `dgpo-bench list`.")
    shared: dict[str, Any] = Field(description="Sections of a run's configuration, the same for all.")
    algorithms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="What each entry overrides in `shared`, by its name in this comparison."
    )
    challenger: str = Field(description="The entry that the verdict compares all others with.")
    labels: dict[str, str] = Field({}, description="Entries' names for people; the others are called as they are.")
    colors: dict[str, Color] = Field(
        {}, description="Entries' colors in the report, #RRGGBB; the others get one of a default palette each."
    )
    evaluation: EvaluationPlan = Field(description="How every run is evaluated.")
    sizes: dict[SizeName, Size] = Field(description="How much `quick`, `default` and `full` spend.")
    notes: dict[str, Any] = Field({}, description="Where the settings come from; for readers alone.")

    @field_validator("sizes")
    @classmethod
    def _all_sizes(cls, sizes: dict[SizeName, Size]) -> dict[SizeName, Size]:
        missing = [name for name in get_args(SizeName) if name not in sizes]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}; give every size its own training and evaluation")
        return sizes

    @field_validator("challenger")
    @classmethod
    def _challenger_is_compared(cls, challenger: str, info: ValidationInfo) -> str:
        _refuse_unknown([challenger], info)
        return challenger

    @field_validator("labels", "colors")
    @classmethod
    def _of_algorithms(cls, values: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        _refuse_unknown(values, info)
        if len(set(values.values())) < len(values):
            raise ValueError("must differ from one another")
        return values

    def run_config(self, algorithm: str, seed: int) -> RunConfig:
        """The complete configuration of one run.

        Raises:
            UserError: a mistake in it.
        """
        return parse_config(self._values(algorithm, seed), f"preset, algorithm {algorithm}")

    def mistakes(self) -> list[str]:
        """What is wrong with the algorithms' configurations, each with the entries that have it; empty for nothing."""
        found: dict[str, list[str]] = {}
        for algorithm in self.algorithms:
            where = f"algorithms.{algorithm}"
            try:
                parse_config(self._values(algorithm, 0), where)
            except UserError as error:
                found.setdefault(str(error).removeprefix(f"{where}: "), []).append(where)
        every = len(self.algorithms) if len(self.algorithms) > 1 else 0
        return [
            f"{'every algorithm' if len(names) == every else ', '.join(names)}: {mistake}"
            for mistake, names in found.items()
        ]

    def check_algorithms(self, names: list[str]) -> None:
        """Find out whether these entries can be compared.

        Raises:
            UserError: one that the preset does not have, or one named twice.
        """
        for name in names:
            if name not in self.algorithms:
                raise UserError(
                    f"--algorithms: no algorithm {name!r} in the preset{did_you_mean(name, self.algorithms)}"
                )
        if len(set(names)) != len(names):
            raise UserError("--algorithms: names one twice")

    def sized(self, name: str, seeds: int | None = None, evaluations: int | None = None) -> Size:
        """One of the sizes, with other seeds or another budget where they are given.

        Raises:
            UserError: no such size, or a budget of nothing.
        """
        size = self.sizes.get(name)  # type: ignore[call-overload]
        if size is None:
            raise UserError(f"--size {name}: choose quick, default or full{did_you_mean(name, list(self.sizes))}")
        if evaluations is not None and evaluations <= 0:
            raise UserError(f"--evaluations {evaluations}: must be more than nothing")
        changes = {"seeds": seeds, "evaluations": evaluations}
        changed: Size = size.model_copy(update={key: value for key, value in changes.items() if value is not None})
        return changed

    def _values(self, algorithm: str, seed: int) -> dict[str, Any]:
        """One run's configuration before it is validated."""
        values = _merged(self.shared, self.algorithms[algorithm])
        training = values.setdefault("training", {})
        if isinstance(training, dict):  # or validation refuses it
            training["seed"] = seed
        return values


def bench_preset_names() -> dict[str, Path]:
    """Shipped comparisons by name."""
    folder = Path(str(resources.files(__package__) / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_preset(source: str) -> Preset:
    """A shipped preset by name, or a YAML file.

    Raises:
        UserError: neither, or what is wrong with the file, all of it in one line.
    """
    values = read_yaml(source, bench_preset_names(), "comparison preset")
    remember_origin(values, source)
    try:
        preset = Preset.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Preset)}") from error
    if mistakes := preset.mistakes():
        raise UserError(f"{source}: {'; '.join(mistakes)}")
    configs = [preset.run_config(algorithm, 0) for algorithm in preset.algorithms]
    if any(config.model != configs[0].model for config in configs):
        raise UserError(f"{source}: all algorithms must start from one base; write model under shared alone")
    for config in configs:  # the workers run what it names, and say nothing themselves
        named = {"model": config.model.path, "prompt set": config.prompts.train}
        named |= {f"reward {label}": term.name(label) for label, term in config.rewards.items()}
        for kind, name in named.items():
            if is_from_file(name):
                tell_of(name, kind)
    return preset


def _refuse_unknown(names: Iterable[str], info: ValidationInfo) -> None:
    """Refuse names that are not among the algorithms, unless those are wrong themselves."""
    algorithms = info.data.get("algorithms")
    for name in names:
        if algorithms is not None and name not in algorithms:
            raise ValueError(f"{name!r} is not among the algorithms{did_you_mean(name, algorithms)}")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``changes`` over ``base``, section by section."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
