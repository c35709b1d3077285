"""Tiny bases of every family, and copies of them in which something is not as it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import load_model

Bases = Callable[[str], Path]
PARTS = {
    "sd15": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "shapes": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    **dict.fromkeys(
        ("flux2-klein", "flux2-dev", "qwen-image", "z-image", "sana"), ("transformer", "vae", "text_encoder")
    ),
}
"""The parts with weights of each family (Stable Diffusion 3 is the embedded world's)."""
EVERY = [(name, part) for name, parts in PARTS.items() for part in parts]
SOME = [("sd15", "unet"), ("sd15", "vae"), ("sd15", "text_encoder"), ("flux", "text_encoder_2")]
"""One part of each library and kind."""


def copied(base: Path, folder: Path, part: str) -> Path:
    """A base whose one part may be written into; the others are links."""
    for each in base.iterdir():
        if each.name == part:
            shutil.copytree(each, folder / part)
        elif each.is_dir():
            (folder / each.name).symlink_to(each)
        else:
            shutil.copy(each, folder)
    return folder


def weights_of(folder: Path, part: str) -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def changed(base: Path, folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A base whose one part's tensors were changed."""
    file = weights_of(copied(base, folder, part), part)
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(names) <= tensors.keys()
        return {name: tensor for name, tensor in tensors.items() if name not in names}

    return change


def loaded(folder: Path, **changes: Any) -> Any:
    return load_model(ModelConfig(path=str(folder), max_sequence_length=16, **changes))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as told:
        loaded(folder, **changes)
    assert "\n" not in str(told.value)
    assert str(folder) in str(told.value)
    return str(told.value)


def sharded(folder: Path, part: str, shards: int = 2) -> list[str]:
    """Spread a part's tensors over files with an index; the tensors' names."""
    file = weights_of(folder, part)
    tensors = load_file(file)
    placed = {}
    for number in range(shards):
        name = f"{file.stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        keys = list(tensors)[number::shards]
        save_file({key: tensors[key] for key in keys}, file.with_name(name), metadata={"format": "pt"})
        placed.update(dict.fromkeys(keys, name))
    file.unlink()
    size = sum(tensor.nbytes for tensor in tensors.values())
    file.with_name(file.name + ".index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": placed})
    )
    return list(tensors)
