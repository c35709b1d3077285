"""Which shape the update of each of ComfyUI's patches has, held against the weight that it is for."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgpo_plugin.common.errors import UserError

DORA_SCALE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}
"""Where a kind's parts have DoRA's magnitudes (comfy/weight_adapter, ``load``)."""


def check_shape(state: Mapping[str, Tensor], key: Any, patch: Any, base: str) -> None:
    """Refuse an update of another shape: ComfyUI sees it only when it samples, and goes on without that layer.

    Args:
        state: the network's weights by name.
        key: a weight's name, or (name, section, function).
        patch: of comfy/weight_adapter, or ("diff" or "set", (tensor,)).
        base: what the model is called.

    Raises:
        UserError: another shape, a weight that is not there, or a kind that this does not know.
    """
    name, section = (key[0], key[1]) if isinstance(key, tuple) else (key, None)
    if name not in state:
        raise UserError(f"ComfyUI has no {name} in this model ({base}) for the adapter's bias; export it without")
    shape = list(state[name].shape)
    if section is not None:  # one of several projections that share a weight: (axis, start, length)
        axis, _, length = section
        shape[axis] = length
    if isinstance(patch, tuple):  # ("diff", (tensor,)) or ("set", (tensor,))
        update: tuple[int, ...] | None = tuple(patch[1][0].shape)
        fits = update == tuple(shape)
    else:
        shape = _enlarged(patch, shape)
        update = _update_shape(patch, shape)
        fits = update == (shape[0], math.prod(shape[1:]))
        _check_magnitudes(name, patch, shape)
    if update is None:
        raise UserError(f"the adapter's {patch.name} for {name}, {tuple(shape)} in this model ({base}), does not fit")
    if not fits:
        raise UserError(
            f"{name} is {tuple(shape)} in this model ({base}), but the adapter's update is {update}; it was made for a "
            f"base of another size"
        )


def _check_magnitudes(name: str, patch: Any, shape: list[int]) -> None:
    """Refuse DoRA's magnitudes unless they are one a row, or one a column, of a weight of that shape.

    Of another shape ComfyUI leaves the layer out, or spreads a plain list of them along the wrong side
    (comfy/weight_adapter/base.py, ``weight_decompose``).
    """
    scale = patch.weights[DORA_SCALE[patch.name]]
    if scale is None or (
        scale.ndim == len(shape) and all(one in (1, all_) for one, all_ in zip(scale.shape, shape, strict=True))
    ):
        return
    raise UserError(
        f"the adapter's dora_scale for {name} is {tuple(scale.shape)}, and ComfyUI needs "
        f"{(shape[0], *[1] * (len(shape) - 1))} for that layer; export it again"
    )


def _enlarged(patch: Any, shape: list[int]) -> list[int]:
    """The shape that ComfyUI pads a weight to before it adds a LoRA, as for FLUX Canny's and Depth's second input."""
    reshaped = patch.weights[5] if patch.name == "lora" else None
    if reshaped is None or len(reshaped) != len(shape) or not all(map(operator.ge, reshaped, shape)):
        return shape
    return [int(size) for size in reshaped]


def _update_shape(patch: Any, shape: list[int]) -> tuple[int, int] | None:
    """(outputs, all inputs) of a patch, as its kind multiplies it out; None if its parts do not go together.

    The kinds and the order of their parts are ComfyUI's (comfy/weight_adapter, ``load`` and ``calculate_weight``).

    Args:
        shape: of the weight, which an orthogonal update turns whatever its inputs.

    Raises:
        UserError: a kind that this does not know.
    """
    parts, kind = patch.weights, patch.name
    if kind == "lora":
        up, down, _, middle, *_ = parts
        kernel = math.prod(middle.shape[2:]) if middle is not None else 1
        return (up.shape[0], math.prod(down.shape[1:]) * kernel) if up.shape[1] == down.shape[0] else None
    if kind == "loha":
        first, second = _product(parts[0], parts[1], parts[5]), _product(parts[3], parts[4], parts[6])
        return first if first == second else None
    if kind == "lokr":
        left = _product(parts[3], parts[4], None) if parts[0] is None else _flat(parts[0])
        right = _product(parts[5], parts[6], parts[7]) if parts[1] is None else _flat(parts[1])
        return (left[0] * right[0], left[1] * right[1]) if left and right else None
    if kind == "boft" and parts[2] is None:
        raise UserError("its BOFT has no alpha, and ComfyUI then leaves it out; add alpha, 0 for no constraint")
    if kind in ("oft", "boft"):
        blocks, size = parts[0].shape[-3:-1]
        return (shape[0], math.prod(shape[1:])) if blocks * size == shape[0] else None
    if kind == "glora":  # either order of its parts: comfy/weight_adapter/glora.py
        sides = {side for part in parts[2:4] for side in (part.shape[0], part[0].numel())}
        return (shape[0], math.prod(shape[1:])) if {shape[0], math.prod(shape[1:])} <= sides else None
    raise UserError(f"its {kind} updates are of a kind that cannot be checked here; use ComfyUI's own Load LoRA")


def _product(first: Tensor | None, second: Tensor | None, core: Tensor | None) -> tuple[int, int] | None:
    """(outputs, inputs) of first second, or of a core (rank, rank, kernel...) between them, LyCORIS' way round."""
    if first is None or second is None:
        return None
    if core is None:
        return (first.shape[0], math.prod(second.shape[1:])) if first.shape[1] == second.shape[0] else None
    return first.shape[1], second.shape[1] * math.prod(core.shape[2:])


def _flat(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], math.prod(tensor.shape[1:])
