"""A task: what a comparison asks of every method, as data in a YAML file; no code here knows what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.load import read_yaml
from dgpo_plugin.config.reward_fields import PlainTerms, Section
from dgpo_plugin.config.short_forms import spelled_out

Guidance = Annotated[float, Field(ge=1)]
STATISTICS = ("sharpness", "color-entropy", "brightness", "jpeg-size", "diversity")
"""Statistics of pictures: the rewards of these names, and how far apart the pictures of one prompt are."""


class Metric(Section):
    """A metric with a name of the task's own; a name that stands for itself needs none of this."""

    reward: str | None = Field(
        None,
        description="As in `dgpo list rewards`, or one's own, path/to/file.py:Name; null where the metric's name says "
        "it.",
    )
    options: dict[str, Any] = Field({}, description="The reward's own settings, as in a run's configuration.")
    at_least: float | None = Field(
        None, description="Count a picture as 1 if the reward gives at least this, else as 0; null for its value."
    )
    label: str = Field("", description="For tables and axes; empty for the name.")
    description: str = Field("", description="One sentence for the reader; empty for what the reward says of itself.")
    better: Literal["higher", "lower"] = Field("higher", description="Which way is good.")
    optional: bool = Field(
        False,
        description="Go on without it where its package, its weights or its server is missing: it is then named as "
        "missing in the report. Otherwise nothing is trained before it is there.",
    )


class InDomain(Section):
    """A metric of the test prompts, which are of the kind that is trained on."""

    metric: str = Field(description="One of the task's metrics or trained rewards, or a reward by its own name.")
    by: str = Field("", description="Field of the prompts' metadata that tells their kind, as `tag`; empty for none.")


class OutOfDomain(Section):
    """Prompts of another kind, and the metrics of them."""

    prompts: str = Field(description="A prompt set, as in a run's configuration.")
    metrics: tuple[str, ...] = Field(min_length=1, description="As in_domain's.")
    by: str = Field("", description="As in_domain's.")


class TaskPrompts(Section):
    """The three sets of a task, no prompt of one in another."""

    train: str = Field(description="What is trained on.")
    validation: str = Field(description="What guidance and settings are chosen on.")
    test: str = Field(description="What is reported; nothing is chosen on it.")


class TaskSampling(Section):
    """How every picture is sampled."""

    steps: int = Field(40, ge=1, description="Steps of the sampler, for base and adapters alike.")
    guidance: Guidance = Field(4.5, description="Guidance of the curves over training, unless a preset has its own.")
    guidances: tuple[Guidance, ...] = Field(
        (1.0, 1.5, 2.0, 3.0, 4.5, 6.0),
        min_length=1,
        description="What the best guidance is chosen from, on validation prompts, for the base and every adapter.",
    )
    images_per_prompt: int = Field(4, ge=1, le=1000, description="Pictures of each prompt; diversity needs two.")

    @field_validator("guidances")
    @classmethod
    def _rising(cls, guidances: tuple[float, ...]) -> tuple[float, ...]:
        if list(guidances) != sorted(set(guidances)):
            raise ValueError("must rise")
        return guidances


class Task(Section):
    """What is asked of every method: prompts, the rewards that are trained on, and what is measured."""

    name: str = Field("", description="In results; empty for the file's.")
    version: int = Field(ge=1, description="Raised with every change of the file that changes a number.")
    description: str = Field("", description="One line for `dgpo-bench list tasks`.")
    prompts: TaskPrompts = Field(description="What is trained on, chosen on and reported.")
    rewards: PlainTerms = Field(
        min_length=1, description="What is trained on, as in a run's configuration; short forms too."
    )
    metrics: dict[str, Metric] = Field({}, description="Metrics with names, settings or words of the task's own.")
    in_domain: tuple[InDomain, ...] = Field(min_length=1, description="What is measured of the test prompts.")
    out_of_domain: tuple[OutOfDomain, ...] = Field((), description="Other prompts, and what is measured of them.")
    statistics: tuple[str, ...] = Field(
        STATISTICS, description="Statistics of the pictures of all test and out-of-domain prompts."
    )
    headline: str = Field("", description="The in-domain metric that verdicts are about; empty for the first.")
    prompts_per_tag: int = Field(
        1, ge=1, description="A kind of prompt counts for the headline if its test set has at least so many of it."
    )
    thresholds: tuple[float, ...] = Field(
        (), description="Values of the headline, rising, that the time to is measured for."
    )
    margin: float = Field(0.02, ge=0, description='Of "not worse out of domain", in units of the metric.')
    sampling: TaskSampling = Field(TaskSampling(), description="How every picture is sampled.")

    @field_validator("rewards", mode="before")
    @classmethod
    def _spell_out(cls, rewards: Any) -> Any:
        return spelled_out(rewards)

    @field_validator("thresholds")
    @classmethod
    def _thresholds_rise(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError("must rise")
        return thresholds

    @field_validator("statistics")
    @classmethod
    def _known_statistics(cls, statistics: tuple[str, ...]) -> tuple[str, ...]:
        for name in statistics:
            if name not in STATISTICS:
                raise ValueError(f"no statistic {name!r}{did_you_mean(name, STATISTICS)}; there are {STATISTICS}")
        return statistics

    @model_validator(mode="after")
    def _parts_suit(self) -> Task:
        if len({each.by for each in self.in_domain if each.by}) > 1:
            raise ValueError("in_domain: metrics name different fields under by; a prompt is of one kind")
        sources = [self.prompts.train, self.prompts.validation, self.prompts.test]
        sources += [each.prompts for each in self.out_of_domain]
        if twice := next((name for name in sources if sources.count(name) > 1), None):
            raise ValueError(f"the prompt set {twice} stands there twice; each has one role")
        names = [each.metric for each in self.in_domain]
        if self.headline and self.headline not in names:
            raise ValueError(f"headline: {self.headline!r} is not among in_domain{did_you_mean(self.headline, names)}")
        if self.metric(self.headline_metric).optional:
            raise ValueError(f"headline: {self.headline_metric!r} is optional; verdicts are about what is always there")
        return self

    @property
    def headline_metric(self) -> str:
        """The metric that verdicts are about."""
        return self.headline or self.in_domain[0].metric

    @property
    def tag_field(self) -> str:
        """The field of the test prompts' metadata that tells their kind; empty for none."""
        return next((each.by for each in self.in_domain if each.by), "")

    def metric_names(self) -> list[str]:
        """Every metric of the task once: in domain, out of domain, statistics."""
        outside = (name for each in self.out_of_domain for name in each.metrics)
        return list(dict.fromkeys([*(each.metric for each in self.in_domain), *outside, *self.statistics]))

    def metric(self, name: str) -> Metric:
        """What a metric's name stands for: the task's own, a reward that is trained on, or a reward by its name."""
        if name in self.metrics:
            return self.metrics[name]
        if name in self.rewards:
            term = self.rewards[name]
            return Metric(reward=term.name(name), options=term.options)
        return Metric(reward=name)


def task_names() -> dict[str, Path]:
    """Shipped tasks by name."""
    folder = Path(str(resources.files(__package__) / "tasks"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_task(source: str) -> Task:
    """A shipped task by name, or a YAML file; files that it names beside it are found there.

    Raises:
        UserError: neither, or what is wrong with the file, all of it in one line.
    """
    values = read_yaml(source, task_names(), "task")
    path = task_names().get(source) or Path(source)
    try:
        task = Task.model_validate(_with_own_files(values, path.parent))
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Task, values)}") from error
    return task if task.name else task.model_copy(update={"name": path.stem})


def _with_own_files(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The file's values with what lies beside it named by its path; names of rewards and metrics stay as written."""
    named = {key: _beside(value, folder) for key, value in values.items() if key not in ("rewards", "in_domain")}
    rewards = spelled_out(values.get("rewards"))
    if isinstance(rewards, Mapping):
        rewards = {label: _own_reward(label, term, folder) for label, term in rewards.items()}
    metrics = named.get("metrics", {})
    for name in [*_measured(values.get("in_domain"), "metric"), *_measured(values.get("out_of_domain"), "metrics")]:
        path = _beside(name, folder)
        if path != name and isinstance(metrics, dict) and not (isinstance(rewards, Mapping) and name in rewards):
            metrics = {name: {"reward": path}, **metrics}
    if isinstance(values.get("out_of_domain"), list):  # its prompts alone are places
        named["out_of_domain"] = [
            {**new, "metrics": old["metrics"]} if isinstance(old, Mapping) and "metrics" in old else new
            for new, old in zip(named["out_of_domain"], values["out_of_domain"], strict=True)
        ]
    kept = {key: values[key] for key in ("in_domain",) if key in values}
    given = {"rewards": rewards} if "rewards" in values else {}
    return {**named, **kept, **given, **({"metrics": metrics} if metrics else {})}


def _measured(sections: Any, key: str) -> list[str]:
    """The metrics that some sections name, as far as they are names."""
    found = [each.get(key) for each in sections if isinstance(each, Mapping)] if isinstance(sections, list) else []
    names = [name for each in found for name in (each if isinstance(each, list) else [each])]
    return [name for name in names if isinstance(name, str)]


def _own_reward(label: Any, term: Any, folder: Path) -> Any:
    """A reward's term; where its label is a file's name, with that file's path."""
    path = _beside(label, folder)
    if path != label and isinstance(term, Mapping) and "reward" not in term:
        return {**term, "reward": path}
    return _beside(term, folder)


def _beside(value: Any, folder: Path) -> Any:
    """The values with names of files that lie in the task's folder made paths, and all others as they are."""
    if isinstance(value, Mapping):
        return {key: _beside(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_beside(each, folder) for each in value]
    if isinstance(value, str) and (is_from_file(value) or value.endswith((".txt", ".jsonl"))):
        file, separator, name = value.rpartition(":") if is_from_file(value) else (value, "", "")
        if (folder / file).is_file():
            return f"{folder / file}{separator}{name}"
    return value


def prompt_sources(task: Task) -> Iterator[tuple[str, str]]:
    """Where each prompt set stands in the file, and what it names."""
    for role in ("train", "validation", "test"):
        yield f"prompts.{role}", getattr(task.prompts, role)
    for number, each in enumerate(task.out_of_domain):
        yield f"out_of_domain.{number}.prompts", each.prompts
