"""A training node's settings: put together from its inputs, and held against those of a run that is to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.identity import MAY_CHANGE
from dgpo_plugin.training.run_folder import RunFolder

from .types import written_lines


def node_config(preset: str, values: Mapping[str, Any], settings: str) -> RunConfig:
    """A preset with the node's values on top, and the lines of its text field on top of those.

    Args:
        values: ``section.field`` to value; ``lora.rank`` among them, and alpha keeps the preset's proportion to it.
        settings: ``section.field=value``, one per line.

    Raises:
        UserError: what the configuration forbids, or a line for what the node's own inputs say: the reward's would name
            another than the one connected, the rank's would leave alpha where it was.
    """
    for line in written_lines(settings):
        key = line.partition("=")[0].strip()
        for name in values:
            if key == name or name.startswith(f"{key}.") or key.startswith(f"{name}."):
                raise UserError(f"setting {line}: {name} is an input of the node; set it there, and take the line out")
    lora = load_config(preset).lora
    values = {**values, "lora.alpha": values["lora.rank"] * lora.alpha / lora.rank}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(preset, overrides + written_lines(settings))


def settle_settings(config: RunConfig, folder: Path) -> None:
    """Give the run in a folder the node's settings, as far as a run that goes on may have others.

    Raises:
        UserError: names the first that it may not.
    """
    run = RunFolder(folder)
    now, before = config.model_dump(mode="json"), run.read_config().model_dump(mode="json")
    if now["model"]["precision"] == "auto":  # what that stands for was settled when the run was started
        now["model"]["precision"] = before["model"]["precision"]
    for section in now:
        for key in now[section]:
            name, value, then = f"{section}.{key}", now[section][key], before[section].get(key)
            # A falling learning rate depends on where the run ends.
            fixed = name == "training.iterations" and config.training.decay != "none"
            if value != then and (fixed or not name.startswith(MAY_CHANGE)):
                longer = f" (or move its end with: dgpo resume {folder} --iterations {value})" if fixed else ""
                raise UserError(
                    f"Train DGPO adapter: {name} is {value!r}, but {folder.name} was started with {then!r}; "
                    f"put it back, or choose another name{longer}"
                )
    now["training"]["replanned"] = before["training"]["replanned"]  # no setting of the node's
    write_text_atomically(run.config, yaml.safe_dump(now, sort_keys=False))
