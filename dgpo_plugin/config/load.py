"""Configurations read: presets and YAML files, ``section.field=value`` on top, and mistakes told in one line.

The fields themselves are in :mod:`dgpo_plugin.config.fields`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.user_file import remember_origin
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.fields import RewardTerm, RunConfig, ScoringConfig
from dgpo_plugin.config.reward_fields import PlainTerms
from dgpo_plugin.config.short_forms import spelled_out
from dgpo_plugin.config.yaml_text import MOST_CHARACTERS, read_yaml_text


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file, with ``section.field=value`` overrides on top.

    Raises:
        UserError: no such preset or file, not YAML, an unknown key, or a value out of range.
    """
    values = read_yaml(source, preset_names(), "preset")
    remember_origin(values, source, Path(source).parent)
    # The algorithm's name first, because it clears the fields of the one before it.
    for override in sorted(overrides, key=lambda text: not text.startswith("algorithm.name=")):
        apply_override(values, override)
    return parse_config(values, source)


def parse_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate nested values; ``where`` opens the message of the UserError that a mistake raises."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig, values)}") from error


class _RewardsToLoad(ScoringConfig):
    """What ``--set`` may say of rewards outside a run: ``scoring`` as its own fields, and the rewards' terms."""

    rewards: PlainTerms


def reward_terms(names: Sequence[str], overrides: Sequence[str] = ()) -> tuple[dict[str, RewardTerm], ScoringConfig]:
    """Rewards to be loaded outside a run, each under its own name, with ``field=value`` on top.

    Args:
        overrides: for all of them ``device=cuda``, ``batch_size=8``; for one of several
            ``rewards.hpsv2.1.options.weights=...``; where there is one alone ``options.weights=...`` is enough.

    Returns:
        The rewards by name, and what holds for all.

    Raises:
        UserError: an unknown key, a value out of range, or a setting of a reward that is not among the names.
    """
    values: dict[str, Any] = {"rewards": {name: {} for name in names}}
    for override in overrides:
        if override.startswith("options") and len(names) > 1:
            raise UserError(f"--set {override}: of which reward? write rewards.{names[0]}.{override}")
        apply_override(values, f"rewards.{names[0]}.{override}" if override.startswith("options") else override)
    for name in values["rewards"]:
        if name not in names:
            raise UserError(f"--set: {name} is not among the rewards{did_you_mean(name, names)}")
    try:
        loaded = _RewardsToLoad.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--set: {explain(error, _RewardsToLoad)}") from error
    return loaded.rewards, ScoringConfig.model_validate(loaded.model_dump(exclude={"rewards"}))


def preset_names() -> dict[str, Path]:
    """Shipped training presets by name."""
    folder = Path(str(resources.files("dgpo_plugin") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_says(path: Path) -> list[str]:
    """The lines of comment that a preset begins with: what it is, what is published of it and what was run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def read_yaml(source: str, presets: Mapping[str, Path], kind: str) -> dict[str, Any]:
    """The mapping in a preset or a YAML file."""
    path = presets.get(source)
    if path is None:
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"no {kind} {source!r}{did_you_mean(source, presets)}; or name a .yaml file")
    try:
        text = read_text(path, MOST_CHARACTERS * 4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    values = read_yaml_text(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: needs keys and values at the top level")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the field of ``section.field=value``, the value in YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write it as section.field=value")
    value = read_yaml_text(text, f"--set {override}: the value")
    remember_origin([key, value], f"--set {override}")
    set_dotted(values, key, value)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested mappings. Naming another algorithm drops the fields of the one before it."""
    if key.startswith("rewards."):
        values["rewards"] = spelled_out(values.get("rewards", {}))
    sections: list[str] = []
    name, rest = _first_name(key, values, sections)
    while rest:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {name} is a value, not a section")
        sections.append(name)
        name, rest = _first_name(rest, values, sections)
    if sections == ["algorithm"] and name == "name" and values.get("name") != value:
        values.clear()
    values[name] = value


def _first_name(key: str, values: Mapping[str, Any], sections: Sequence[str]) -> tuple[str, str]:
    """The first name of ``a.b.c`` and what follows it: names may hold dots, as rewards' labels do (``hpsv2.1``).

    It is the longest one that is there already; a new reward's label ends where a field of rewards follows.
    """
    parts = key.split(".")
    splits = [(".".join(parts[:count]), parts[count:]) for count in range(1, len(parts) + 1)]
    found = [split for split in splits if split[0] in values][-1:]
    if not found and sections == ["rewards"]:
        found = [split for split in splits if not split[1] or split[1][0] in RewardTerm.model_fields]
    name, rest = (found or splits)[0]
    return name, ".".join(rest)
