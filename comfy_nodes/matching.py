"""A LoRA on a ComfyUI model, strictly: ComfyUI's own key map decides, and what it does not know is an error.

ComfyUI's loaders write a line to the log for a key that matches nothing, and go on; the picture then looks like the
base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.utils
from torch import Tensor

from dgpo_plugin.adapters import AdapterFile
from dgpo_plugin.adapters.kinds import ALPHA, LORA, by_kind, counted, is_for_text, kind_of, lora_layers
from dgpo_plugin.common.errors import UserError

from .patch_shapes import check_shape

WHOLE_UPDATES = (LORA, "LoHa", "LoKr", "OFT", "BOFT", "GLoRA", "weight difference")
"""Kinds that each are a weight's whole update: of two of them ComfyUI keeps the last."""


@dataclass(frozen=True)
class PatchedModel:
    """A ComfyUI model with an adapter on it, and what of the file is on it.

    Attributes:
        model: the patched clone.
        matched, total: keys of the file's that are on it, and all of them.
        kinds: what is on it besides LoRA, by kind: how many keys.
        for_text: keys for text encoders, which a MODEL does not have; they are left out.
    """

    model: Any
    matched: int
    total: int
    kinds: dict[str, int]
    for_text: list[str]


class _Read(dict[str, Tensor]):
    """An adapter's tensors, of which it is known which ones ComfyUI took."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        found: Any = default
        if key in self:
            found = self[key]
        return found


def apply_strictly(model: Any, file: AdapterFile, strength: float) -> PatchedModel:
    """Clone a ComfyUI model (ModelPatcher) and put every tensor of an adapter on it, as ComfyUI itself would.

    Raises:
        UserError: the adapter is unusable, or any of its tensors matches no weight of the model, has another shape, or
            is of a kind that ComfyUI does not apply there.
    """
    base = type(model.model).__name__
    tensors = file.usable.tensors
    for_text = [key for key in tensors if is_for_text(key)]
    mine = {key: tensor for key, tensor in tensors.items() if not is_for_text(key)}
    if not mine:
        raise UserError(f"all of its {len(tensors)} keys are for a text encoder; ComfyUI's Load LoRA takes a CLIP too")
    converted = _Read(comfy.lora_convert.convert_lora(mine))
    patches, known = _patches(converted, key_map(model.model))
    unmatched = sorted(set(converted) - known)
    if unmatched:
        raise UserError(_why_not(file.header, converted, unmatched, base))
    state = model.model.state_dict()
    for key, patch in patches.items():
        check_shape(state, key, patch, base)
    patched = model.clone()
    patched.add_patches(patches, strength)
    kinds = {kind: len(keys) for kind, keys in by_kind(mine).items() if kind not in (LORA, ALPHA)}
    return PatchedModel(patched, len(mine), len(tensors), kinds, for_text)


def key_map(network: Any) -> dict[str, Any]:
    """ComfyUI's own key map of a model: an adapter's names, and the weight, or (weight, section, function), of each."""
    there = network.state_dict().keys()
    names = comfy.lora.model_lora_keys_unet(network, {})
    settings = network.model_config.unet_config
    layers = settings.get("num_blocks", settings.get("depth"))
    if isinstance(network, comfy.model_base.SD3) and layers != settings.get("depth"):
        # It turns scale and shift of the layer that it takes for the last, by the number of heads.
        for last in (settings["depth"] - 1, layers - 1):
            weight = f"diffusion_model.joint_blocks.{last}.context_block.adaLN_modulation.1.weight"
            turned = (weight, None, comfy.utils.swap_scale_shift)
            for spelling, target in list(names.items()):
                if (target[0] if isinstance(target, tuple) else target) == weight and "norm1_context" in spelling:
                    names[spelling] = turned if last == layers - 1 else weight
    # The map also has names of weights that this model is too small to have.
    return {name: key for name, key in names.items() if (key[0] if isinstance(key, tuple) else key) in there}


def _patches(tensors: _Read, names: Mapping[str, Any]) -> tuple[dict[Any, Any], set[str]]:
    """ComfyUI's patch for every weight that an adapter changes, and the keys that they are made of.

    Raises:
        UserError: two for one weight, of which ComfyUI would drop the first without a word; or half of one.
    """
    beginnings = {key[:end] for key in tensors for end in range(len(key) + 1) if key[end : end + 1] in (".", "_", "")}
    patches: dict[Any, Any] = {}
    known: set[str] = set()
    for name, target in names.items():
        if name not in beginnings:
            continue
        tensors.taken = set()
        try:
            made = comfy.lora.load_lora(tensors, {name: target}, log_missing=False)
        except KeyError as error:
            raise UserError(f"{name} lacks {error}; fetch or export the file again") from error
        kinds = [kind for kind in by_kind(sorted(tensors.taken)) if kind in WHOLE_UPDATES]
        if len(kinds) > 1:
            raise UserError(f"{name} has {' and '.join(kinds)}, of which ComfyUI applies only one; export it again")
        if isinstance(target, tuple) and any(key != target for key in made):
            raise UserError(f"{name} has a bias difference, which ComfyUI puts on whole layers only; export it without")
        for key, patch in made.items():
            if key in patches and tensors.taken - known:
                raise UserError(f"{name} is for a weight that another of its keys changes too; export it again")
            patches[key] = patch
        if made or all(kind_of(key) == ALPHA for key in tensors.taken):
            known |= tensors.taken
    return patches, known


def _why_not(header: Mapping[str, str], tensors: Mapping[str, Tensor], unmatched: list[str], base: str) -> str:
    """What is said of keys that ComfyUI's map does not have: the kind, where it is the kind that does not fit."""
    other = {kind: keys for kind, keys in by_kind(unmatched).items() if kind not in (LORA, ALPHA)}
    halves = set(unmatched) - {half for layer in lora_layers(tensors).values() for half in (layer.down, layer.up)}
    alone = sorted(key for key in halves if kind_of(key) == LORA)
    if alone:
        return f"{alone[0]} has no other half; fetch or export the file again"
    matched = f"{len(tensors) - len(unmatched)} of {len(tensors)} keys match this model ({base})"
    if len(unmatched) < len(tensors) and len(unmatched) == sum(map(len, other.values())):
        return f"{matched}; ComfyUI applies none of the others to it: {counted(unmatched)}; export it without them"
    also = f", among them {counted(key for keys in other.values() for key in keys)}" if other else ""
    made_for = header.get("modelspec.architecture", header.get("ss_base_model_version", "an unnamed base"))
    return (
        f"{matched}; it was made for {made_for} (first that does not match: {unmatched[0]}{also}); load that base, or "
        f"an adapter of layers that ComfyUI knows"
    )
