"""Prompts by name: registered sets, worlds' sets, published lists, a file, or a Hugging Face dataset."""

from __future__ import annotations

from typing import Any

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.names import PROMPT_SETS, WORLDS
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.registry import resolved
from dgpo_plugin.common.user_file import is_from_file, told
from dgpo_plugin.prompts.datasets import read_dataset
from dgpo_plugin.prompts.fetched import FETCHED, fetch_prompts
from dgpo_plugin.prompts.files import read_prompts

DATASET = "hf:"
"""``hf:owner/name``, ``hf:owner/name:split`` or ``hf:owner/name:split:column``."""


def load_prompts(source: str) -> list[Prompt]:
    """Load prompts: a set or a published list by name, a file, a dataset, or what a function of yours returns.

    Args:
        source: a name, a ``.txt`` / ``.jsonl`` file, ``hf:`` and a dataset's name, or ``file.py:function``.

    Raises:
        UserError: it is none of them, or cannot be read.
    """
    if source.startswith(DATASET):
        return read_dataset(source.removeprefix(DATASET))
    if source in FETCHED:
        return fetch_prompts(source)
    if source.endswith((".txt", ".jsonl")):
        return read_prompts(source)
    world, _, name = source.rpartition("/")
    of_world = world in WORLDS and source not in PROMPT_SETS  # another package may add to a world's sets
    if of_world or (is_from_file(world) and not is_from_file(name)):
        return _prompts_of_world(world, name)
    return _checked(PROMPT_SETS.load(source), source)


def prompt_set_names() -> dict[str, str]:
    """What each prompt set that is at hand is, by name: this package's, other packages' and the worlds'."""
    worlds = {f"{world}/{name}": "" for world in WORLDS for name in WORLDS.load(world).prompt_sets}
    return {**{name: entry.about for name, entry in PROMPT_SETS.entries().items()}, **worlds}


def _prompts_of_world(world: str, name: str) -> list[Prompt]:
    sets = WORLDS.load(world).prompt_sets
    if name not in sets:
        known = [f"{world}/{each}" for each in sets]
        raise UserError(f"no prompt set {f'{world}/{name}'!r}{did_you_mean(f'{world}/{name}', known)}")
    return _checked(resolved(sets[name]), f"{world}/{name}")


def _checked(function: Any, source: str) -> list[Prompt]:
    """What a function of nothing gives, which may be a user's or another package's, if it is prompts."""
    try:
        found = list(function())
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever their code raises
        raise UserError(f"prompt set {source}: failed with {told(error)}") from error
    if not found or not all(isinstance(prompt, Prompt) for prompt in found):
        raise UserError(f"prompt set {source}: must give prompts (dgpo_plugin.Prompt), at least one")
    return found
