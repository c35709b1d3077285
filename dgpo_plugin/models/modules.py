"""The parts of a pipeline's folder, one after the other: looked at first, then loaded, each with its name in errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dgpo_plugin.common.errors import prefixed
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.memory import load_quantized
from dgpo_plugin.models.part_files import check_part, left_out, parts_of
from dgpo_plugin.models.parts import load_part, told_in_one_line

if TYPE_CHECKING:
    from dgpo_plugin.models.pipeline import PipelineModel

log = logging.getLogger(__name__)


def check_parts(family: type[PipelineModel], folder: Path) -> None:
    """Refuse a folder whose files are not whole, or not what their names say.

    Raises:
        UserError: the first such file.
    """
    for name, module_class in parts_of(folder, family.component_classes, family.optional_parts).items():
        if name not in family.load_options:
            check_part(folder, name, module_class)


def load_modules(
    family: type[PipelineModel], folder: Path, config: ModelConfig, device: torch.device
) -> dict[str, nn.Module | None]:
    """The parts with weights, by the names of their folders; None for an optional one that is left out.

    What their files hold and nobody reads is told in one line, and what is left out in another.

    Args:
        device: of a denoiser that is quantized; the others stay in main memory.

    Raises:
        UserError: one cannot be loaded, or not all of its weights arrived.
    """
    absent = left_out(folder, family.optional_parts)
    modules: dict[str, nn.Module | None] = dict.fromkeys(absent)
    dtypes, notes = family.dtypes(config), []
    for name, module_class in parts_of(folder, family.component_classes, family.optional_parts).items():
        if module_class is None:
            continue
        with prefixed(name), told_in_one_line():
            if name == family.prefix and config.quantization is not None:
                part = load_quantized(module_class, folder / name, config, device)
            else:
                part = load_part(module_class, folder / name, dtypes[name])
        modules[name] = part.module
        if part.note():
            notes.append(f"{name} {part.note()}")
    if absent:
        log.warning("model %s: goes without %s, which it does not have", config.path, " and ".join(absent))
    if notes:
        log.warning("model %s: %s", config.path, "; ".join(notes))
    return modules
