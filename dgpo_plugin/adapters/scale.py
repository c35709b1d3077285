"""At which scale a LoRA file means to be applied, told from its tensors and its header.

Our own files need none of this: their scale is in the weights. Older files of peft and diffusers keep alpha in the
header alone, or in a file beside them, which diffusers reads and ComfyUI does not: with alpha = 2 rank they run there
at half strength.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgpo_plugin.common.errors import UserError

LORA_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))
"""How a layer's two keys end, of (rank, inputs) and of (outputs, rank), in diffusers' and in kohya's names."""
DIFFUSERS_HEADER = "lora_adapter_metadata"
OWN_ALPHA = "dgpo.original_alpha"
REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
"""In a stranger's regular expression: nested repeats can take exponential time, and no layer's name needs them."""


@dataclass(frozen=True, eq=False)
class ScaledTensors:
    """An adapter's tensors as loaders are to take them.

    Attributes:
        tensors: by key, with the scale in them where loaders would not apply it.
        note: a line for people on what the scale is and where it comes from.
    """

    tensors: dict[str, Tensor]
    note: str


def fold_scale(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> ScaledTensors:
    """Multiply a header's alpha / rank into the (outputs, rank) matrices, in float32; leave other files as they are.

    Raises:
        UserError: a header that cannot be read.
    """
    alphas = sorted(key for key in tensors if key.endswith(".alpha"))
    if alphas:
        scales = {round(_tensor_scale(tensors, key), 4) for key in alphas}
        return ScaledTensors(dict(tensors), f"{_span(scales)}, alpha / rank as tensors, which loaders apply")
    if OWN_ALPHA in header:
        return ScaledTensors(dict(tensors), f"1, alpha / rank is in the weights (alpha was {header[OWN_ALPHA]})")
    if DIFFUSERS_HEADER not in header:
        return ScaledTensors(dict(tensors), "1, the file states no alpha")
    settings = _settings(header)
    scaled, scales = dict(tensors), set()
    for down, up, module in _pairs(tensors):
        try:
            scale = _header_scale(settings, module, tensors[down].shape[0])
        except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
            raise UserError(f"{DIFFUSERS_HEADER} in its header has no usable alpha ({error})") from error
        scaled[up] = tensors[up].float() * scale
        scales.add(round(scale, 4))
    return ScaledTensors(
        scaled,
        f"{_span(scales)}, alpha / rank from the header, or from peft's adapter_config.json beside the file, "
        f"multiplied in here (loaders that read neither miss it)",
    )


def _pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """(key of the (rank, inputs) matrix, key of the (outputs, rank) one, module) of every adapted layer."""
    return [
        (key, key.removesuffix(down) + up, key.removesuffix(down))
        for key in tensors
        for down, up in LORA_SUFFIXES
        if key.endswith(down) and key.removesuffix(down) + up in tensors
    ]


def _tensor_scale(tensors: Mapping[str, Tensor], key: str) -> float:
    """alpha / rank of the layer that an ``.alpha`` tensor is for."""
    module = key.removesuffix(".alpha")
    ranks = [tensors[module + down].shape[0] for down, _ in LORA_SUFFIXES if module + down in tensors]
    return float(tensors[key]) / ranks[0] if ranks else float("nan")


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings in a header of diffusers, by name."""
    try:
        settings = json.loads(header[DIFFUSERS_HEADER])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{DIFFUSERS_HEADER} in its header is not JSON; export it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{DIFFUSERS_HEADER} in its header is no JSON object; export it again")
    return settings


def _header_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """peft's rule: alpha of the layer's pattern, else of all, over the rank, or over its root with rslora."""
    prefix, _, inner = module.partition(".")

    def setting(name: str, default: Any) -> Any:
        return settings.get(f"{prefix}.{name}", settings.get(name, default))

    alpha = float(setting("lora_alpha", rank))
    for pattern, value in (setting("alpha_pattern", None) or {}).items():
        if REPEATED_GROUP.search(pattern):
            raise ValueError(f"alpha_pattern {pattern[:40]!r} repeats a group, which may take for ever to match")
        if re.match(rf"(.*\.)?({pattern})$", inner):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if setting("use_rslora", False) else rank)


def _span(scales: set[float]) -> str:
    """One number if all are equal, else the least and the largest."""
    low, high = min(scales, default=1.0), max(scales, default=1.0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
