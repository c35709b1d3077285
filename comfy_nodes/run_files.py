"""A training node's files: the run in ``output/dgpo/NAME``, its adapter in ``output/loras``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.tables import as_table
from dgpo_plugin.prompts.files import prompts_hash, read_prompts
from dgpo_plugin.training.run_folder import RunFolder


def run_folder(name: str, going_on: bool) -> Path:
    """The folder ``output/dgpo/NAME``; for a new run with a number if that is taken.

    Raises:
        UserError: a name that is no file's.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"Train DGPO adapter: name {name!r} must be of letters, digits, - _ and .; change it")
    home = Path(folder_paths.get_output_directory()) / "dgpo"
    if going_on and RunFolder(home / name).config.exists():
        return home / name
    number = 1
    while RunFolder(folder := home / (name if number == 1 else f"{name}-{number}")).config.exists():
        number += 1
    return folder


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as a file of the run; a run that goes on must have the same ones.

    Raises:
        UserError: other prompts than are there.
    """
    if RunFolder(path.parent).config.exists() and path.exists():
        if prompts_hash(read_prompts(path)) != prompts_hash(prompts):
            raise UserError(
                f"Train DGPO adapter: {path.parent.name} was trained on other prompts; put them back to resume"
            )
        return
    lines = [json.dumps({"prompt": p.text, **p.metadata}, ensure_ascii=False) for p in prompts]
    write_text_atomically(path, "\n".join(lines) + "\n")


def publish(folder: Path) -> str | None:
    """Copy the run's adapter to ``output/loras``, where loaders list it; its name there, None if there is none."""
    adapter = RunFolder(folder).adapter
    if not adapter.exists():
        return None
    name = f"{folder.name}.safetensors"
    target = Path(folder_paths.get_output_directory()) / "loras" / name
    with atomic_path(target) as temporary:
        shutil.copyfile(adapter, temporary)
    return name


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a finished run gives on: its adapter's tensors by key, the loss of every iteration, the card as text."""

    tensors: Mapping[str, Tensor]
    losses: list[float]
    card: str


def read_result(folder: Path, adapter: Path) -> TrainingResult:
    """Read what a finished run wrote."""
    file = read_adapter(adapter)
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return TrainingResult(file.tensors, losses, as_table(AdapterCard.of(file).rows()))
