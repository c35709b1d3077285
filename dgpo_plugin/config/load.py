"""Configurations read: presets and YAML files, ``section.field=value`` on top, and mistakes told in one line.

The fields themselves are in :mod:`dgpo_plugin.config.fields`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.fields import RewardConfig, RunConfig


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file, with ``section.field=value`` overrides on top.

    Raises:
        UserError: no such preset or file, not YAML, an unknown key, or a value out of range.
    """
    values = read_yaml(source, preset_names(), "preset")
    # The algorithm's name first, because it clears the fields of the one before it.
    for override in sorted(overrides, key=lambda text: not text.startswith("algorithm.name=")):
        apply_override(values, override)
    return parse_config(values, source)


def parse_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate nested values; ``where`` opens the message of the UserError that a mistake raises."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig)}") from error


def reward_config(name: str, overrides: Sequence[str] = ()) -> RewardConfig:
    """One reward to be loaded, with ``field=value`` on top: ``device=cuda``, ``batch_size=8``, ``options.weights=...``.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    values = _overridden(overrides)
    return _reward(name, {**values, "options": {name: values.get("options", {})}})


def reward_configs(names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, RewardConfig]:
    """Rewards to be loaded one by one, with ``field=value`` on top for all of them; ``options`` are by their names.

    Raises:
        UserError: an unknown key, a value out of range, or options of a reward that is not among the names.
    """
    values = _overridden(overrides)
    options = values.pop("options", {})
    for name in options:
        if name not in names:
            raise UserError(f"--set options: {name} is not among the rewards{did_you_mean(name, names)}")
    return {name: _reward(name, {**values, "options": {name: options.get(name, {})}}) for name in names}


def _overridden(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    return values


def _reward(name: str, values: Mapping[str, Any]) -> RewardConfig:
    try:
        return RewardConfig.model_validate({**values, "name": name})
    except ValidationError as error:
        raise UserError(f"--set: {explain(error, RewardConfig)}") from error


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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not YAML{line}; check indentation and quotes") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: needs keys and values at the top level")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the field of ``section.field=value``, the value in YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    set_dotted(values, key, value)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested mappings. Naming another algorithm drops the fields of the one before it."""
    *sections, field = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {section} is a value, not a section")
    if sections == ["algorithm"] and field == "name" and values.get("name") != value:
        values.clear()
    values[field] = value
