"""A comparison preset: a task, a model, what all algorithms share, what each has of its own, and how much is spent."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dgpo_plugin.common.errors import UserError, did_you_mean, prefixed
from dgpo_plugin.common.user_file import is_from_file, remember_origin, tell_of
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import parse_config, read_yaml

from .size import CONTROLS, Size, SizeName
from .task import Guidance, Task, load_task

PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F00", "#5A4FCF")
"""For entries without a color of their own; told apart by color-blind people too (Okabe and Ito, the first six)."""
NONE = "none"
"""The one entry of a comparison that trains nothing, :func:`preset_of_task`'s."""
GRAYS = ("#555555", "#7A7A7A", "#9A9A9A", "#B5B5B5")
"""For controls."""
Color = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]


class Range(BaseModel):
    """What a setting is drawn from: one of some values, or between two numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: tuple[Any, ...] = Field((), description="One of these, all alike.")
    low: float | None = Field(None, description="The lowest.")
    high: float | None = Field(None, description="The highest.")
    log: bool = Field(False, description="Draw the logarithm evenly instead of the number.")

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        bounds = (self.low, self.high)
        if bool(self.choices) == (bounds != (None, None)) or (bounds != (None, None) and None in bounds):
            raise ValueError("give choices, or low and high")
        low, high = self.low, self.high
        if low is not None and high is not None and not (low < high and (low > 0 or not self.log)):
            raise ValueError("low must be below high, and above 0 for a logarithm")
        return self


class Preset(BaseModel):
    """One comparison: a task, algorithms, what they share and what each has of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field(description="One line for `dgpo-bench list`.")
    task: str = Field(description="What is asked of every method: a shipped task's name, or a task's YAML file.")
    guidance: Guidance | None = Field(None, description="Guidance of the curves over training; null for the task's.")
    shared: dict[str, Any] = Field(
        description="Sections of a run's configuration, the same for all: the model, and what the task does not say."
    )
    algorithms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="What each entry overrides in `shared`, by its name in this comparison."
    )
    by_default: tuple[str, ...] = Field(
        (), description="Entries that are compared unless a command names others; empty for all."
    )
    challenger: str = Field(description="The entry that the verdict compares all others with.")
    labels: dict[str, str] = Field({}, description="Entries' names for people; the others are called as they are.")
    colors: dict[str, Color] = Field(
        {}, description="Entries' colors in the report, #RRGGBB; the others get one of a default palette each."
    )
    search: dict[str, dict[str, Range]] = Field(
        {},
        description="What `dgpo-bench tune` draws settings from, by dotted key: under `shared` for every entry alike, "
        "under an entry's name for that one.",
    )
    sizes: dict[SizeName, Size] = Field(description="How much `quick`, `default` and `full` spend.")
    notes: dict[str, Any] = Field({}, description="Where the settings come from; for readers alone.")

    @field_validator("sizes")
    @classmethod
    def _all_sizes(cls, sizes: dict[SizeName, Size]) -> dict[SizeName, Size]:
        missing = [name for name in get_args(SizeName) if name not in sizes]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}; give every size its own training and evaluation")
        return sizes

    @field_validator("by_default")
    @classmethod
    def _are_entries(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        _refuse_unknown(names, info)
        if len(set(names)) < len(names):
            raise ValueError("names one twice")
        return names

    @field_validator("challenger")
    @classmethod
    def _challenger_is_compared(cls, challenger: str, info: ValidationInfo) -> str:
        _refuse_unknown([challenger], info)
        usual = info.data.get("by_default")
        if usual and challenger not in usual:
            raise ValueError(f"{challenger!r} is not among by_default{did_you_mean(challenger, usual)}")
        return challenger

    @field_validator("algorithms")
    @classmethod
    def _free_names(cls, algorithms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in algorithms:
            if name in ("all", "base", "shared", *CONTROLS) or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"{name!r} cannot name an entry: all, base, shared and controls' names are taken, and it names a "
                    "folder"
                )
        return algorithms

    @field_validator("search")
    @classmethod
    def _of_entries(cls, search: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        _refuse_unknown([name for name in search if name != "shared"], info)
        return search

    @field_validator("shared")
    @classmethod
    def _not_the_tasks(cls, shared: dict[str, Any]) -> dict[str, Any]:
        for key in ("prompts", "rewards", "evaluation"):
            if key in shared:
                raise ValueError(f"{key}: the task says it; take it out here, or name another task")
        return shared

    @field_validator("labels", "colors")
    @classmethod
    def _of_algorithms(cls, values: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        _refuse_unknown(values, info)
        if len(set(values.values())) < len(values):
            raise ValueError("must differ from one another")
        return values

    def run_config(self, task: Task, entry: str, seed: int, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """The complete configuration of one run, of an algorithm or of a control.

        Args:
            changes: sections on top.

        Raises:
            UserError: a mistake in it.
        """
        return parse_config(self._values(task, entry, seed, changes or {}), f"preset, entry {entry}")

    def mistakes(self, task: Task) -> list[str]:
        """What is wrong with the algorithms' configurations, each with the entries that have it; empty for nothing."""
        found: dict[str, list[str]] = {}
        for algorithm in self.algorithms:
            where = f"algorithms.{algorithm}"
            try:
                parse_config(self._values(task, algorithm, 0, {}), where)
            except UserError as error:
                found.setdefault(str(error).removeprefix(f"{where}: "), []).append(where)
        every = len(self.algorithms) if len(self.algorithms) > 1 else 0
        return [
            f"{'every algorithm' if len(names) == every else ', '.join(names)}: {mistake}"
            for mistake, names in found.items()
        ]

    @property
    def usual(self) -> list[str]:
        """The entries that are compared where no others are named."""
        return list(self.by_default or self.algorithms)

    def chosen(self, text: str | None) -> list[str]:
        """The entries that a command line names, comma-separated or ``all``; None for the usual ones.

        Raises:
            UserError: one that the preset does not have, or one named twice.
        """
        if text is None:
            return self.usual
        names = list(self.algorithms) if text == "all" else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in self.algorithms:
                raise UserError(
                    f"--algorithms: no algorithm {name!r} in the preset{did_you_mean(name, self.algorithms)}"
                )
        if len(set(names)) != len(names):
            raise UserError("--algorithms: names one twice")
        return names

    def sized(
        self,
        name: str,
        seeds: int | None = None,
        evaluations: int | None = None,
        controls: str | None = None,
        flops: float | None = None,
    ) -> Size:
        """One of the sizes, with other seeds, another budget or other controls where they are given.

        Args:
            evaluations, flops, controls: as of :meth:`Size.changed`.

        Raises:
            UserError: no such size or control, a budget of nothing, or two of them.
        """
        size: Size | None = self.sizes.get(name)  # type: ignore[call-overload]
        if size is None:
            raise UserError(f"--size {name}: choose quick, default or full{did_you_mean(name, list(self.sizes))}")
        return size.changed(seeds, evaluations, controls, flops)

    def _values(self, task: Task, entry: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """One run's configuration before it is validated."""
        of_task = {
            "prompts": {"train": task.prompts.train, "held_out": task.prompts.validation},
            "rewards": {label: term.model_dump(exclude_defaults=True) for label, term in task.rewards.items()},
            "evaluation": {
                "steps": task.sampling.steps,
                "guidance": self.guidance or task.sampling.guidance,
                "images": 2,
            },
        }
        algorithm, control = (self.challenger, CONTROLS[entry][1]) if entry in CONTROLS else (entry, {})
        values = _merged(of_task, self.shared)
        for each in (self.algorithms[algorithm], control, changes):
            values = _merged(values, each)
        training = values.setdefault("training", {})
        if isinstance(training, dict):  # or validation refuses it
            training["seed"] = seed
        return values


def bench_preset_names() -> dict[str, Path]:
    """Shipped comparisons by name."""
    folder = Path(str(resources.files(__package__) / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def is_file_name(source: str) -> bool:
    """Whether a preset or a task is named by its file."""
    return source.endswith((".yaml", ".yml"))


def name_of(source: str) -> str:
    """What a preset or a task is called: its name, or its file's."""
    return Path(source).stem if is_file_name(source) else source


def load_preset(source: str) -> tuple[Preset, Task]:
    """A shipped preset by name, or a YAML file, and its task; a task's file is looked for beside it.

    Raises:
        UserError: neither, or what is wrong with the files, all of it in one line.
    """
    values = read_yaml(source, bench_preset_names(), "comparison preset")
    remember_origin(values, source)
    try:
        preset = Preset.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Preset, values)}") from error
    beside = Path(source).parent / preset.task
    is_beside = is_file_name(preset.task) and beside.is_file()
    with prefixed(source):
        task = load_task(str(beside) if is_beside else preset.task)
    if mistakes := preset.mistakes(task):
        raise UserError(f"{source}: {'; '.join(mistakes)}")
    configs = [preset.run_config(task, algorithm, 0) for algorithm in preset.algorithms]
    if any(config.model != configs[0].model for config in configs):
        raise UserError(f"{source}: all algorithms must start from one base; write model under shared alone")
    for config in configs:  # the workers run what it names, and say nothing themselves
        named = {"model": config.model.path, "prompt set": config.prompts.train}
        named |= {f"reward {label}": term.name(label) for label, term in config.rewards.items()}
        for kind, name in named.items():
            if is_from_file(name):
                tell_of(name, kind)
    return preset, task


def preset_of_task(source: str, model: str | None) -> tuple[Preset, Task]:
    """A comparison of nothing but a base on a task, to measure adapters with.

    Raises:
        UserError: no such task, or no model.
    """
    task = load_task(source)
    if model is None:
        raise UserError(f"{source}: a task knows no model; name it with --model, or name a comparison's preset")
    size = Size(evaluations=1, seeds=1)
    everything = {"test_prompts": 10**6, "out_of_domain_prompts": 10**6, "validation_prompts": 100}
    preset = Preset(
        description=task.description,
        task=source,
        shared={"model": {"path": model, "precision": "auto"}},
        algorithms={NONE: {}},
        challenger=NONE,
        sizes={
            "quick": size,
            "default": size.model_copy(update={"test_prompts": 60}),
            "full": size.model_copy(update=everything),
        },
    )
    return preset, task


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
