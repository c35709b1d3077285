"""A LoRA on a ComfyUI model, strictly: ComfyUI's own key map decides, and what it does not know is an error.

ComfyUI's loaders write a line to the log for a key that matches nothing, and go on; the picture then looks like the
base model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils

from dgpo_plugin.adapters import AdapterFile
from dgpo_plugin.common.errors import UserError


@dataclass(frozen=True)
class PatchedModel:
    """A ComfyUI model with an adapter on it, and how many of the file's keys match its weights."""

    model: Any
    matched: int
    total: int


def apply_strictly(model: Any, file: AdapterFile, strength: float) -> PatchedModel:
    """Clone a ComfyUI model (ModelPatcher) and put every tensor of an adapter on it.

    Raises:
        UserError: the adapter is unusable, or any of its tensors matches no weight of the model or has another shape.
    """
    base = type(model.model).__name__
    converted = comfy.lora_convert.convert_lora(dict(file.usable.tensors))
    there = model.model.state_dict().keys()
    # The map also has names of weights that this model is too small to have.
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    names = {name: key for name, key in names.items() if (key[0] if isinstance(key, tuple) else key) in there}
    patches = comfy.lora.load_lora(converted, names, log_missing=False)
    known = set().union(*(getattr(patch, "loaded_keys", ()) for patch in patches.values()))
    unmatched = sorted(set(converted) - known)
    if unmatched:
        made_for = file.header.get(
            "modelspec.architecture", file.header.get("ss_base_model_version", "an unnamed base")
        )
        raise UserError(
            f"{len(converted) - len(unmatched)} of {len(converted)} keys match this model ({base}); it was "
            f"made for {made_for} (first that does not match: {unmatched[0]}); load that base, or another adapter"
        )
    for key, patch in patches.items():
        _check_shape(model, key, patch)
    patched = model.clone()
    patched.add_patches(patches, strength)
    return PatchedModel(patched, len(known), len(converted))


def _check_shape(model: Any, key: Any, patch: Any) -> None:
    """Refuse an update of another shape: ComfyUI sees it only when it samples, and goes on without that layer."""
    name, section = key if isinstance(key, tuple) else (key, None)
    up, down, *_ = patch.weights
    shape = list(comfy.utils.get_attr(model.model, name).shape)
    if section is not None:  # one of several projections that share a weight: (axis, start, length)
        axis, _, length = section
        shape[axis] = length
    if up.shape[0] != shape[0] or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        raise UserError(
            f"{name} is {tuple(shape)} in this model ({type(model.model).__name__}), but the adapter's update is "
            f"({up.shape[0]}, {math.prod(down.shape[1:])}); it was made for a base of another size"
        )
