"""What lies at the places that a run's configuration names: its content counts when the run goes on, not the place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dgpo_plugin.common.content import path_hash
from dgpo_plugin.common.user_file import is_from_file, loaded_hash
from dgpo_plugin.config.fields import RewardTerm, RunConfig
from dgpo_plugin.config.places import exists, is_url, judges_at, may_be_path
from dgpo_plugin.rewards import RewardSet


def contents_of(config: RunConfig, rewards: RewardSet) -> dict[str, str]:
    """What the places of a base's adapter, an algorithm, rewards' options and a guard that stops hold, by their keys.

    That is the SHA-256 of a file or a folder, and of what a server's address leads to what it serves.

    Args:
        config: with absolute paths.

    Raises:
        UserError: a file cannot be read.
    """
    found = {}
    if config.model.adapter is not None:
        found["model.adapter"] = path_hash(Path(config.model.adapter))
    network = config.algorithm.picture_network
    if network is not None and exists(Path(network)):
        found["algorithm.features"] = path_hash(Path(network))
    if is_from_file(config.algorithm.name):
        found["algorithm.name"] = loaded_hash([config.algorithm.name])
    for label, term in config.judged_by.items():
        title = rewards.members[label].reward.title if label in rewards.members else ""
        found |= _of_options(f"{judges_at(config)}.{label}", label, term, title)
    guard = config.training.guard
    for label, term in guard.metrics.items() if guard is not None and guard.stop else ():
        key = f"training.guard.metrics.{label}"
        found |= _of_options(key, label, term, "")
        if is_from_file(term.name(label)):
            found[f"{key}.reward"] = loaded_hash([term.name(label)])
    return found


def _of_options(key: str, label: str, term: RewardTerm, title: str) -> dict[str, str]:
    """What the places in one reward's options hold.

    Args:
        key: of the reward.
        title: what it says of itself, in the place of a server's content.
    """
    found = {}
    for option, value in option_values(term.options, f"{key}.options."):
        if is_url(value):
            found[option] = title
        elif isinstance(value, str) and may_be_path(_word(option), value) and exists(Path(value)):
            found[option] = path_hash(Path(value), f"reward {label}'s {_word(option)}")
    return found


def option_values(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a reward's options by their keys, with dots; a list's have numbers, but for one of addresses."""
    for key, value in options.items():
        if isinstance(value, list | tuple) and not is_url(value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from option_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(key: str) -> str:
    """An option's own name, of ``rewards.hps.options.files.0`` files."""
    return [part for part in key.split(".") if not part.isdecimal()][-1]
