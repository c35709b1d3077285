"""What a task measures of pictures: each metric is one object, its meaning and its computation together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_plugin.common.errors import UserError, did_you_mean, in_one_line
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import is_from_file, loaded_hash
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards.base import Reward, checked_rewards
from dgpo_plugin.rewards.load import load_reward
from dgpo_plugin.rewards.registry import REWARDS

from .records import MetricRecord
from .task import STATISTICS, Metric, Task

Relation = Literal["trained", "same data", "untrained", "statistic"]
VERSION = "1"
"""Of the metrics of this package; raised when one of them computes something else than before."""
LEARNED_FROM: dict[str, frozenset[str]] = {
    "pickscore": frozenset({"Pick-a-Pic"}),
    "hpsv2": frozenset({"HPD v2"}),
    "hpsv2.1": frozenset({"HPD v2"}),
    "imagereward": frozenset({"ImageRewardDB"}),
    # Tuned on a mix of others' preference data (arXiv 2503.05236); counted as having seen all of these.
    "unifiedreward": frozenset({"Pick-a-Pic", "HPD v2", "ImageRewardDB"}),
    "geneval": frozenset({"GenEval's detector"}),
    "geneval-strict": frozenset({"GenEval's detector"}),
    "ocr": frozenset({"rapidocr's reader"}),
    "ocr-exact": frozenset({"rapidocr's reader"}),
    "tesseract-exact": frozenset({"Tesseract's reader"}),
}
"""What judges share with one another: people's preferences that they learned from, or the very network that looks."""
TOLD_BY_OPTIONS = ("remote", "judge")
"""Rewards that are another for every other setting."""


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        record: what it means, for results.
        compute: of pictures, float32 (N, 3, H, W) in [0, 1], and their prompts, those of one prompt in a row: one
            number each, (N,).
        check: what keeps it from judging some prompts, a line each; none if it can judge them all.
    """

    name: str
    record: MetricRecord
    compute: Callable[[Tensor, Sequence[Prompt]], NDArray[np.float64]]
    check: Callable[[list[Prompt]], list[str]] = lambda _: []


def load_measures(
    task: Task,
    scoring: ScoringConfig,
    prompts: Mapping[str, Sequence[Prompt]],
    loaded: Mapping[str, Reward] | None = None,
    missing: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Measure]:
    """The metrics of a task, loaded; an optional one that is not there has only a record that says why.

    Args:
        scoring: how rewards are computed.
        prompts: of each metric, for its reward to say whether it can judge them.
        loaded: rewards that are there already, by the task's label of what is trained on.
        missing: why optional metrics were missing when the base was measured; they stay so.
        names: which of them; None for all.

    Raises:
        UserError: a metric that is unknown, misses a package, its weights or a server, or cannot judge a prompt.
    """
    measures = {}
    for name in task.metric_names() if names is None else names:
        try:
            if missing and name in missing:
                raise UserError(missing[name])
            measures[name] = _loaded(task, name, scoring, prompts.get(name, ()), loaded or {})
        except UserError as error:
            if not task.metric(name).optional:
                raise UserError(f"task {task.name}, metric {name}: {error}") from error
            record = _record(task, name, missing=str(error))
            measures[name] = Measure(name, record, _absent)
    return measures


def check_metrics(task: Task) -> dict[str, str]:
    """Find out, without loading any weights, whether a task's metrics are known and their packages and servers there.

    Returns:
        Why optional ones are missing, by name.

    Raises:
        UserError: an unknown metric or trained reward, or one that is missing and not optional.
    """
    missing = {}
    for label, term in task.rewards.items():
        _known(f"task {task.name}, rewards.{label}", term.name(label), task)
        _look_up(f"task {task.name}, rewards.{label}", term.name(label), term.options)
    for name in task.metric_names():
        if name == "diversity":
            continue
        metric, where = task.metric(name), f"task {task.name}, metric {name}"
        _known(where, metric.reward or name, task)
        try:
            _look_up(where, metric.reward or name, metric.options)
        except UserError as error:
            if not metric.optional:
                raise
            missing[name] = str(error).removeprefix(f"{where}: ")
    return missing


def _known(where: str, name: str, task: Task) -> None:
    """Refuse a name that stands for nothing, with the near one: of the task's own, or a reward's."""
    if not is_from_file(name) and name not in REWARDS:
        near = did_you_mean(name, [each for each in (*task.metrics, *task.rewards, *REWARDS) if each != name])
        raise UserError(f"{where}: no metric or reward {name!r}{near}; or name a file.py:name")


def _look_up(where: str, name: str, options: Mapping[str, object]) -> None:
    """Refuse a reward that misses a package or its server, or a user's that is broken."""
    try:
        entry = REWARDS.get(name)
        if entry.missing:
            raise UserError(entry.install)
        if is_from_file(name):
            REWARDS.load(name)
        elif entry.target.startswith("dgpo_plugin.rewards.served.client:"):
            load_reward(name, RewardTerm(options=dict(options)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def relation(task: Task, name: str) -> Relation:
    """What a metric has to do with what is trained on."""
    if name == "diversity":
        return "statistic"
    metric = task.metric(name)
    measured, learned = metric.reward or name, frozenset[str]()
    for label, term in task.rewards.items():
        trained = term.name(label)
        same_options = trained not in TOLD_BY_OPTIONS or dict(term.options) == dict(metric.options)
        if trained == measured and same_options:
            return "trained"
        learned |= LEARNED_FROM.get(trained, frozenset())
    if measured in STATISTICS:
        return "statistic"
    return "same data" if LEARNED_FROM.get(measured, frozenset()) & learned else "untrained"


def diversity(images: Tensor, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """How far each picture is from the others of its prompt: the mean of their root mean square pixel distances, (N,).

    A picture that is alone has none, NaN. The mean over a prompt's pictures is that over its pairs.
    """
    found = np.full(len(images), np.nan)
    flat = images.flatten(1).double()
    for members in _runs(prompts):
        if len(members) > 1:
            distances = torch.cdist(flat[members], flat[members]) / flat.shape[1] ** 0.5
            found[members] = (distances.sum(1) / (len(members) - 1)).numpy()
    return found


def _runs(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Positions of equal prompts that stand in a row."""
    runs: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if runs and prompts[runs[-1][0]] == prompt:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _loaded(
    task: Task, name: str, scoring: ScoringConfig, prompts: Sequence[Prompt], loaded: Mapping[str, Reward]
) -> Measure:
    record = _record(task, name)
    if name == "diversity":
        return Measure(name, record, diversity)
    metric = task.metric(name)
    reward = _shared(task, metric, name, loaded) or load_reward(
        metric.reward or name, RewardTerm(options=metric.options), scoring
    )
    if problems := reward.check(list(prompts)):
        raise UserError(f"cannot judge {len(problems)} prompts ({problems[0]})")
    if reward.network is not None:
        record = record.model_copy(update={"weights": _weights_hash(reward)})

    def compute(images: Tensor, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = checked_rewards(reward, images, prompts, name).double().numpy()
        return values if metric.at_least is None else (values >= metric.at_least).astype(np.float64)

    return Measure(name, record, compute, reward.check)


def _shared(task: Task, metric: Metric, name: str, loaded: Mapping[str, Reward]) -> Reward | None:
    """The run's own reward, where a metric is that with the same settings: its weights are in memory once."""
    for label, reward in loaded.items():
        term = task.rewards.get(label)
        if term is not None and term.name(label) == (metric.reward or name) and term.options == metric.options:
            return reward
    return None


def _absent(_images: Tensor, _prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    raise AssertionError("a metric that is missing is not computed")


def _record(task: Task, name: str, missing: str = "") -> MetricRecord:
    """What a metric means; of one that is missing no version is known."""
    if name == "diversity":
        about = (
            "How far the pictures of one prompt are from one another (root mean square of pixels); a fall is collapse."
        )
        return MetricRecord(label="Diversity", description=about, better="none", relation="statistic", version=VERSION)
    metric, related = task.metric(name), relation(task, name)
    entry = REWARDS.get(metric.reward or name)
    about = metric.description or entry.about[:1].upper() + entry.about[1:]
    return MetricRecord(
        label=metric.label or (name.replace("-", " ").capitalize() if name in STATISTICS else name),
        description=about or f"What {metric.reward or name} gives.",
        better="none" if related == "statistic" and name not in task.metrics else metric.better,
        relation=related,
        version="" if missing else _version(metric, name),
        missing=missing,
    )


def _version(metric: Metric, name: str) -> str:
    """Of a metric's computation: ours, another package's, or the content of a user's file; and its settings."""
    reward = metric.reward or name
    entry = REWARDS.get(reward)
    version = VERSION
    if is_from_file(reward):
        REWARDS.load(reward)
        version = loaded_hash([reward])[:12]
    elif entry.package:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            version = f"{entry.package} {installed(entry.package)}"
        except PackageNotFoundError:
            version = entry.package
    settings = {key: value for key, value in metric.options.items() if key not in ("url", "urls")}
    if metric.at_least is not None:
        settings["at_least"] = metric.at_least
    return version + (f" {json.dumps(settings, sort_keys=True, default=str)}" if settings else "")


def _weights_hash(reward: Reward) -> str:
    """SHA-256 of a network's weights, names and shapes among it, whatever they were loaded from."""
    digest = hashlib.sha256()
    assert reward.network is not None
    for key, tensor in sorted(reward.network.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def try_measures(
    measures: Mapping[str, Measure], prompts: Mapping[str, Sequence[Prompt]], size: tuple[int, int]
) -> dict[str, str]:
    """Have every metric judge two noisy pictures, so that what cannot is known before anything is trained.

    Args:
        prompts: that each is for.
        size: height and width of the pictures.

    Returns:
        What went wrong, by name.
    """
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    wrong = {}
    for name, measure in measures.items():
        if measure.record.missing or name not in prompts:
            continue
        try:
            measure.compute(noise, [prompts[name][0]] * 2)
        except UserError as error:
            wrong[name] = str(error)
        except Exception as error:  # whatever a user's reward raises
            wrong[name] = in_one_line(error)
    return wrong
