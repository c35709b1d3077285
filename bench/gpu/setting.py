"""What a row measures with: the run's configuration, the model's shapes, its plan, the device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.distributed.device import best_device, device_memory
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import settle_precision
from dgpo_plugin.training.plan import Plan, make_plan

from .flops import Flops, count_flops
from .published import Published, published
from .random_model import random_conditioning, random_model
from .rows import Row

SIDE = {"sdxl": 1024}
"""Width and height in pixels, by model; 512 for others."""
PROMPTS = [f"a photo of {number} {noun}" for number in ("two", "three", "four") for noun in ("apples", "dogs")]


@dataclass(frozen=True)
class Setting:
    """Everything that one row is measured with.

    Attributes:
        model: its published shapes.
        config: of the run; its model's path holds the configurations alone.
        tiny: whether this is a rehearsal.
    """

    row: Row
    model: Published
    config: RunConfig
    device: torch.device
    tiny: bool

    def random_model(self, *, encoders: bool = True) -> Model:
        """The model with random weights; see :func:`dgpo_bench.gpu.random_model.random_model`."""
        return random_model(self.model, self.config.model, self.device, encoders=encoders)

    def policy(self, model: Model) -> Policy:
        """A model with a fresh adapter, on the device."""
        return Policy(model, self.config.lora, seed=0, unconditional=random_conditioning(model, 1))

    def plan(self) -> Plan:
        """What `dgpo plan` says of the run."""
        return make_plan(self.config)

    def flops(self) -> Flops:
        """Floating-point operations of one image's passes."""
        return count_flops(self.model, self.config.model, self.config.lora)


@contextmanager
def setting(row: Row, *, tiny: bool) -> Iterator[Setting]:
    """Make a row's setting, whose files are there for the block.

    Raises:
        UserError: a configuration that is not valid, or a precision that does not work here.
    """
    shapes = published(row.model)
    if tiny:
        shapes = shapes.tiny()
    device = best_device()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        shapes.write_configurations(folder / "model")
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        config = parse_config(_values(row, shapes, folder, tiny=tiny), row.name)
        config = settle_precision(config, device, Processes())
        yield Setting(row, shapes, config, device, tiny)


def fits(plan: Plan) -> bool:
    """Whether `dgpo plan` would say that a run fits this device."""
    return plan.fits(device_memory()[1])


def _values(row: Row, shapes: Published, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """The run's configuration: published settings with a group of 24, and what the row changes of them."""
    values: dict[str, Any] = {
        "model": {
            "path": str(folder / "model"),
            "precision": "bf16",
            "width": SIDE.get(row.model, 512),
            "height": SIDE.get(row.model, 512),
            "max_sequence_length": 128,
        },
        "lora": {"rank": 64, "alpha": 128, "init": "gaussian"},
        "prompts": {"train": str(folder / "prompts.txt")},
        "rewards": {"jpeg-size": {"weight": 1}},
        "rollout": {"steps": 10},
        "algorithm": dict(row.algorithm),
        "training": {"prompts_per_iteration": 1, "group_size": 24, "micro_batch_size": 8, "iterations": 1000},
    }
    for name, value in row.settings.items():
        section, field = name.split(".")
        values[section][field] = value
    if tiny:
        side = shapes.rehearsed_side
        values["model"] |= {"width": side, "height": side, "max_sequence_length": 16, "precision": "fp32"}
        values["lora"]["rank"] = 4
        values["training"] |= {"group_size": 4, "micro_batch_size": 2}
        values["rollout"]["steps"] = 6
    return values
