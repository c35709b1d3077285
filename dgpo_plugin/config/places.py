"""The places that a configuration names: made absolute when a run starts, kept relative inside the run's own folder.

So a run goes on from any working directory, and its folder may be moved with what lies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.fields import RewardTerm, RunConfig

PROMPT_FILES = (".txt", ".jsonl")
NO_PLACE_OPTIONS = ("model", "name")
"""Options of rewards that name something on the other side of a wire, whatever lies here under that name."""
PLACE_OPTIONS = ("weights", "path", "file", "folder", "dir", "question")
"""Ends of the names of those whose value is a place though it has neither a slash nor an ending."""


def absolute_places(config: RunConfig, root: Path) -> RunConfig:
    """The configuration with every relative path that leads somewhere from ``root`` made absolute; all else as it is.

    Args:
        root: the working directory, or the run's folder.
    """
    home = Path(root).absolute()

    def absolute(path: str) -> str:
        return path if Path(path).is_absolute() or not exists(home / path) else str(home / path)

    return _moved(config, absolute)


def places_in(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration as it is written into a run's folder: what lies in there relative to it, with ``/``."""
    home = folder.absolute()

    def relative(path: str) -> str:
        inside = Path(path).is_absolute() and Path(path).is_relative_to(home)
        return Path(path).relative_to(home).as_posix() if inside else path

    return _moved(config, relative)


def lost_places(config: RunConfig) -> dict[str, str]:
    """Where the base, prompt files or files of one's own were and nothing is any more, by key; of absolute paths."""
    named = {
        "model.path": config.model.path,
        "model.adapter": config.model.adapter or "",
        "algorithm.features": config.algorithm.picture_network or "",
        "prompts.train": config.prompts.train,
        "prompts.held_out": config.prompts.held_out or "",
        **pair_places(config),
        **{f"{judges_at(config)}.{label}.reward": term.name(label) for label, term in config.judged_by.items()},
        **{f"training.guard.metrics.{label}.reward": term.name(label) for label, term in _watched(config).items()},
    }
    paths = {key: Path(file_and_name(place)[0]) for key, place in named.items()}
    return {key: str(path) for key, path in paths.items() if path.is_absolute() and not exists(path)}


def pair_places(config: RunConfig) -> dict[str, str]:
    """Where a run's preferred pairs are, by key; nothing where it learns from rewards."""
    named = {} if config.pairs is None else {"train": config.pairs.train, "held_out": config.pairs.held_out}
    return {f"pairs.{key}": place for key, place in named.items() if place}


def judges_at(config: RunConfig) -> str:
    """The key that the rewards of a run's pictures stand under."""
    return "rewards" if config.rewards else "evaluation.rewards"


def file_and_name(place: str) -> tuple[str, str]:
    """``path/to/file.py`` and what follows it, as in ``:name``; of any other place, all of it and nothing."""
    head, separator, name = place.partition(".py:")
    return (f"{head}.py", f":{name}") if separator else (place, "")


def is_url(value: object) -> bool:
    """Whether an option's value says where a server is: an address, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(isinstance(one, str) and one.startswith(("http://", "https://")) for one in values)


def may_be_path(key: str, value: str) -> bool:
    """Whether an option's value is a path if something lies there, and not a word that a file happens to be called."""
    if key in NO_PLACE_OPTIONS or not value.strip() or is_url(value):
        return False
    return "/" in value or "\\" in value or bool(Path(value).suffix) or key.endswith(PLACE_OPTIONS)


def exists(path: Path) -> bool:
    """Whether something lies at a path; not at a text that cannot be one."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero in it
        return False


def _moved(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """The configuration with a change of paths made wherever one stands."""

    def named(place: str) -> str:
        path, name = file_and_name(place)
        return change(path) + name if is_from_file(place) else place

    def prompts(place: str | None) -> str | None:
        return change(place) if place and place.endswith(PROMPT_FILES) else named(place) if place else place

    def terms(given: Mapping[str, RewardTerm]) -> dict[str, RewardTerm]:
        moved = {}
        for label, term in given.items():
            own = named(term.name(label)) if is_from_file(term.name(label)) else term.reward
            options = {key: _option(key, value, change) for key, value in term.options.items()}
            moved[label] = term.model_copy(update={"reward": own, "options": options})
        return moved

    model, training = config.model.path, config.training
    model = named(model) if is_from_file(model) or model in WORLDS else change(model)
    adapter = None if config.model.adapter is None else change(config.model.adapter)
    network = config.algorithm.picture_network
    features = {} if network is None else {"features": change(network)}
    moved: dict[str, Any] = {}
    if config.rewards:
        moved["rewards"] = terms(config.rewards)
    elif config.judged_by:
        moved["evaluation"] = config.evaluation.model_copy(update={"rewards": terms(config.judged_by)})
    if config.pairs is not None:
        pairs = {key.removeprefix("pairs."): change(place) for key, place in pair_places(config).items()}
        moved["pairs"] = config.pairs.model_copy(update=pairs)
    if training.guard is not None:
        guard = training.guard.model_copy(update={"metrics": terms(training.guard.metrics)})
        training = training.model_copy(update={"guard": guard})
    return config.model_copy(
        update={
            **moved,
            "model": config.model.model_copy(update={"path": model, "adapter": adapter}),
            "prompts": config.prompts.model_copy(
                update={"train": prompts(config.prompts.train), "held_out": prompts(config.prompts.held_out)}
            ),
            "training": training,
            "algorithm": config.algorithm.model_copy(update={"name": named(config.algorithm.name), **features}),
        }
    )


def _watched(config: RunConfig) -> Mapping[str, RewardTerm]:
    """The metrics of a run's guard; none without one."""
    return {} if config.training.guard is None else config.training.guard.metrics


def _option(key: str, value: Any, change: Callable[[str], str]) -> Any:
    """An option's value with every text in it that may be a path changed."""
    if isinstance(value, Mapping):
        return {inner: _option(inner, one, change) for inner, one in value.items()}
    if isinstance(value, list | tuple):
        return [_option(key, one, change) for one in value]
    return change(value) if isinstance(value, str) and may_be_path(key, value) else value
