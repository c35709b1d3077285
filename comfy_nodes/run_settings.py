"""A training node's settings: put together from its inputs, and held against those of a run that is to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.config.places import absolute_places
from dgpo_plugin.training.identity import bound_settings
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
        UserError: names those that it may not.
    """
    run = RunFolder(folder)
    before = run.read_config()
    # What auto stands for was settled when the run was started; that its end was moved is no setting of the node's.
    now = absolute_places(config, Path.cwd())
    precision = before.model.precision if now.model.precision == "auto" else now.model.precision
    now = now.model_copy(
        update={
            "model": now.model.model_copy(update={"precision": precision}),
            "training": now.training.model_copy(update={"replanned": before.training.replanned}),
        }
    )
    values, then = (bound_settings(each.model_dump(mode="json")) for each in (now, before))
    if now.training.decay != "none":  # it falls to where the run ends
        values["training.iterations"], then["training.iterations"] = now.training.iterations, before.training.iterations
    differing = [name for name in sorted({*values, *then}) if values.get(name) != then.get(name)]
    if differing:
        told = "; ".join(
            f"{name} is {values.get(name)!r}, but {folder.name} was started with {then.get(name)!r}"
            for name in differing
        )
        end = "training.iterations"
        longer = f" (or move its end with: dgpo resume {folder} --iterations {values[end]})" if end in differing else ""
        raise UserError(f"Train DGPO adapter: {told}; put it back, or choose another name{longer}")
    run.write_config(now)
