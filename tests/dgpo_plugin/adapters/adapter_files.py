"""Adapter files that something is odd about, made from a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters import read_adapter
from dgpo_plugin.config.load import load_config

CONFIG = load_config("shapes", ["lora.rank=2", "lora.alpha=4", "model.precision=fp32"])


def changed(good: Path, folder: Path, change: Callable[[Tensor], Tensor], *, second: bool = True) -> Path:
    """A copy with one of its tensors changed, and no hash to find it out by."""
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    name = sorted(n for n in tensors if n.endswith(".lora_B.weight" if second else ".lora_A.weight"))[0]
    tensors[name] = change(tensors[name]).contiguous()
    path = folder / "changed.safetensors"
    save_file(tensors, path, {key: value for key, value in header.items() if key != "modelspec.hash_sha256"})
    return path


def headed(good: Path, folder: Path, **header: str) -> Path:
    """A copy of the tensors under another header."""
    file = read_adapter(good)
    tensors, own = dict(file.tensors), file.header
    path = folder / "headed.safetensors"
    save_file(tensors, path, {"dgpo.base_parts": own["dgpo.base_parts"], **header})
    return path
