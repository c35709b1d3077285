"""The memory that every shipped preset takes, for `dgpo list models`: `python tools/plan_presets.py [--write]`.

From the published shapes of the models, without their weights; `--write` puts it into dgpo_plugin/presets/memory.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgpo_bench.gpu.published import published_models
from dgpo_plugin.commands.terminal import quieten
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.config.load import load_config, preset_names
from dgpo_plugin.training.plan import GIB, Plan, make_plan

TARGET = Path(__file__).parents[1] / "dgpo_plugin" / "presets" / "memory.json"


def plan_preset(name: str) -> Plan:
    """A shipped preset's plan."""
    config = load_config(name)
    path = config.model.path
    if path in WORLDS:
        return make_plan(config)
    with tempfile.TemporaryDirectory() as folder:
        published_models()[path].write_configurations(Path(folder))
        return make_plan(config.model_copy(update={"model": config.model.model_copy(update={"path": folder})}))


def row(name: str) -> dict[str, Any]:
    """What is kept of it."""
    path, plan = load_config(name).model.path, plan_preset(name)
    family = "StableDiffusion3Pipeline" if path in WORLDS else published_models()[path].pipeline
    return {"family": family, "model": path, "parameters": plan.parameters, "gib": round(plan.peak / GIB, 2)}


def main(arguments: Sequence[str]) -> None:
    """Print a row for each preset."""
    quieten()
    rows = {}
    for name in preset_names():
        rows[name] = row(name)
        print(f"{name:<24} {rows[name]['parameters'] / 1e9:>6.2f} B {rows[name]['gib']:>7.2f} GiB", flush=True)
    if "--write" in arguments:
        write_text_atomically(TARGET, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
