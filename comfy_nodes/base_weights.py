"""Whether a ComfyUI model has the weights that an adapter was trained on, told by the header's fingerprint.

ComfyUI renames diffusers' tensors, puts several into one, and casts them; a single-file checkpoint and an fp16 copy are
the same base all the same. Its own key map says what each tensor is called in diffusers and which slice it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dgpo_plugin.models.base_identity import base_from_text
from dgpo_plugin.models.fingerprint import Mark, compared, mark, short, unpacked

from .matching import key_map

ENOUGH = 0.5
"""Share of the numbers in a fingerprint whose place in the model must be known."""
TOLD = {
    "the same": "these very weights",
    "the same but rounded": "the same weights but rounded",
    "differs": "MISMATCH: this model has other weights",
    "cannot be told": "whether these are the same weights cannot be told",
}
PREFIXES = ("transformer.", "unet.", "diffusion_model.", "")
"""Before diffusers' names in ComfyUI's key map."""


def base_note(model: Any, header: Mapping[str, str]) -> str:
    """A line on whether a ComfyUI model (ModelPatcher) has the weights that an adapter was trained on."""
    stated = (header.get(key, "").strip() for key in ("dgpo.base_model", "ss_base_model_version"))
    trained_on = next((name for name in stated if name), "a base the file does not name")
    parts = base_from_text(header.get("dgpo.base_parts", ""))
    denoisers = [parts[name] for name in ("transformer", "unet") if name in parts]
    then = unpacked(denoisers[0].fingerprint) if denoisers else {}
    now = _marks(model, then) if then else {}
    enough = sum(then[name].count for name in now) >= ENOUGH * sum(each.count for each in then.values())
    verdict = compared(then, now) if then and enough else "cannot be told"
    return f"trained on {trained_on}; {TOLD[verdict]}"


def _marks(model: Any, then: Mapping[bytes, Mark]) -> dict[bytes, Mark]:
    """The marks of a model's tensors, as they are without any patch, by diffusers' names, of those in a fingerprint."""
    weights = model.get_key_patches("diffusion_model.")
    found: dict[bytes, Mark] = {}
    for key, place in key_map(model.model).items():
        for name in _diffusers_names(key):
            if short(name) in then and short(name) not in found:
                made = _mark(name, place, weights)
                found |= {} if made is None else {made.name: made}
    return found


def _diffusers_names(key: str) -> Iterator[str]:
    """What a key of ComfyUI's map may be in diffusers; it writes a U-Net's attention as older versions had it."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            stem = key.removeprefix(prefix).replace(".processor.to_", ".to_")
            yield f"{stem}.weight"
            yield f"{stem}.0.weight"


def _mark(name: str, place: Any, weights: Mapping[str, Any]) -> Mark | None:
    """The mark of a tensor, or of its slice; None where it is not there or packed in a way that cannot be read.

    Args:
        place: ComfyUI's key, or (key, slice or None, change or nothing).
    """
    key, *more = place if isinstance(place, tuple) else (place,)
    if key not in weights:
        return None
    kept, unpack = weights[key][0]
    tensor = unpack(kept)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return None
    section, change = (*more, None, None)[:2]
    if section is not None:
        axis, start, length = section
        if start + length > tensor.shape[axis]:
            return None
        tensor = tensor.narrow(axis, start, length)
    return mark(name, tensor if change is None else change(tensor), kept.dtype)
