"""What the tensors of an adapter file are, told from their keys: LoRA and whose it is, or what else is in there.

The names are those of LyCORIS (``lycoris/modules``), peft (``peft/tuners``), kohya's sd-scripts and ComfyUI
(``comfy/lora.py``, ``comfy/weight_adapter``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

LORA_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down", ".lora_up"),
    # xlabs and USO, for FLUX: `processor.qkv_lora1.down.weight`.
    (".down.weight", ".up.weight"),
)
"""How a layer's two keys end, of (rank, inputs) and of (outputs, rank): diffusers' and kohya's, then older ones."""

_NAMED = re.compile(r"\.lora_([AB])(\.\w+\.weight)$")
"""The same with the name that peft's model gives an adapter in between: ``.lora_A.default.weight``."""
LORA, ALPHA, TEXT_ENCODER, UNKNOWN = "LoRA", "alpha", "text-encoder", "unknown"
_FOR_TEXT = re.compile(
    r"^(lora_te\d*_|lora_prior_te_|lycoris_te\d?_|text_encoders?(_\d)?[._]|bundle_emb\."
    r"|(clip_[lgh]|t5xxl|text_model|conditioner|cond_stage_model)\.?)|(^|\.)emb_params$"
)
_KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector)(\.|$)", "DoRA"),
    (r"\.hada_[wt]\d", "LoHa"),
    (r"\.lokr_[wt]\d", "LoKr"),
    (r"\.(oft_blocks|oft_diag|oft_r|oft_R)(\.|$)", "OFT"),
    (r"\.boft_", "BOFT"),
    (r"\.rescale$", "OFT"),
    (r"\.[ab][12]\.weight$|\.bm\.weight$", "GLoRA"),
    (r"\.(on_input|ia3_l)(\.|$)", "(IA)^3"),
    (r"\.vera_lambda_|(^|\.)vera_[AB]", "VeRA"),
    (r"\.lora_mid\.weight$", "Tucker LoRA (lora_mid)"),
    (r"\.(diff_b|b_norm)$|\.lora_(B|up)(\.default)?\.bias$", "bias difference"),
    (r"\.reshape_weight$", "enlarged layer"),
    (r"\.(diff|set_weight|w_norm)$|_norm\.scale$", "weight difference"),
    (r"(^|\.)(lora_controlnet|image_proj|ip_adapter)(\.|$)", "ControlNet or IP-Adapter"),
    (r"\.alpha$", ALPHA),
    (r"(\.weight|\.bias|_table|_embedding|_token)$", "whole-weight"),
)


@dataclass(frozen=True)
class Layer:
    """One layer's LoRA in a file.

    Attributes:
        down, up: the keys of its (rank, inputs) and (outputs, rank) matrices.
        rank: inner size.
    """

    down: str
    up: str
    rank: int


def lora_layers(tensors: Mapping[str, Tensor], *, denoiser_only: bool = False) -> dict[str, Layer]:
    """The LoRA layers of a file, by the beginning that their keys share, in the file's order.

    Args:
        denoiser_only: leave out those of text encoders.
    """
    layers: dict[str, Layer] = {}
    for key, tensor in tensors.items():
        down, up = _ends(key)
        name = key.removesuffix(down)
        if (
            down
            and key.endswith(down)
            and tensor.ndim
            and name + up in tensors
            and not (denoiser_only and is_for_text(key))
        ):
            layers[name] = Layer(key, name + up, tensor.shape[0])
    return layers


def is_matrix(key: str) -> bool:
    """Whether a tensor is one of a LoRA's two matrices, by its key."""
    return _ends(key) != ("", "")


def is_down(key: str) -> bool:
    """Whether a tensor is a LoRA's (rank, inputs) matrix, by its key."""
    down, _ = _ends(key)
    return down != "" and key.endswith(down)


def _ends(key: str) -> tuple[str, str]:
    """How the keys of a layer's two matrices end, of which one is given; nothing if it is none."""
    named = _NAMED.search(key)
    if named and named[2] != ".weight":
        return f".lora_A{named[2]}", f".lora_B{named[2]}"
    return next((pair for pair in LORA_SUFFIXES if key.endswith(pair)), ("", ""))


def is_for_text(key: str) -> bool:
    """Whether a tensor belongs to a text encoder, or to embeddings that one looks up."""
    return _FOR_TEXT.search(key) is not None


def kind_of(key: str) -> str:
    """What a tensor is, by its key: ``LoRA``, ``alpha``, ``LoKr``, ``bias difference``, ..., or ``unknown``."""
    if is_matrix(key):
        return LORA
    return next((name for pattern, name in _KINDS if re.search(pattern, key)), UNKNOWN)


def by_kind(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by what they are, the most frequent kind first; those of text encoders are a kind of their own."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(TEXT_ENCODER if is_for_text(key) else kind_of(key), []).append(key)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def counted(keys: Iterable[str]) -> str:
    """How many tensors of each kind, and an example of each: ``4 LoKr (first: ...), 2 DoRA (first: ...)``."""
    named = {("of no known kind" if kind == UNKNOWN else kind): of_it for kind, of_it in by_kind(keys).items()}
    return ", ".join(f"{len(of_it)} {kind} (first: {of_it[0]})" for kind, of_it in named.items())
