"""Layers of Stable Diffusion 3 as Stability AI and kohya name them, renamed as diffusers does: a file's joint_blocks.

diffusers reads no adapter under these names; its converter of whole checkpoints is what is followed
(diffusers/loaders/single_file_utils.py, ``convert_sd3_transformer_checkpoint_to_diffusers``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_NATIVE = re.compile(r"^(?:lora_unet_|(?:model\.)?diffusion_model\.)(.+)\.(lora_down|lora_up|lora_A|lora_B)\.weight$")
_BLOCK = re.compile(r"^joint_blocks_(\d+)_(x|context)_block_(.+)$")
_IN_BLOCK = {
    "x": {
        "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn_proj": ("attn.to_out.0",),
        "attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2_proj": ("attn2.to_out.0",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "adaLN_modulation_1": ("norm1.linear",),
    },
    "context": {
        "attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn_proj": ("attn.to_add_out",),
        "mlp_fc1": ("ff_context.net.0.proj",),
        "mlp_fc2": ("ff_context.net.2",),
        "adaLN_modulation_1": ("norm1_context.linear",),
    },
}
_OUTSIDE = {
    "context_embedder": "context_embedder",
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def sd3_names(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """An adapter's tensors with native names made diffusers' (``<module>.lora_A.weight``); others are left as they are.

    Args:
        layers: of the model, whose last and output modulations have scale and shift the other way round in diffusers.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _NATIVE.match(key)
        flat = match[1].replace(".", "_") if match else ""
        modules = _modules(flat)
        if match is None or not modules:
            if not (key.endswith(".alpha") and _modules(_flat_alpha(key))):
                named[key] = tensor
            continue
        down = match[2] in ("lora_down", "lora_A")
        parts = [tensor] * len(modules) if down else list(tensor.chunk(len(modules)))
        if not down and modules[0] in ("norm_out.linear", f"transformer_blocks.{layers - 1}.norm1_context.linear"):
            parts = [torch.cat(parts[0].chunk(2)[::-1])]
        for module, part in zip(modules, parts, strict=True):
            named[f"{module}.{'lora_A' if down else 'lora_B'}.weight"] = part
    return named


def _modules(flat: str) -> tuple[str, ...]:
    """diffusers' modules of a native one, its dots as underscores: three for a fused projection; none if unknown."""
    block = _BLOCK.match(flat)
    if block:
        inside = _IN_BLOCK[block[2]].get(block[3], ())
        return tuple(f"transformer_blocks.{block[1]}.{module}" for module in inside)
    return (_OUTSIDE[flat],) if flat in _OUTSIDE else ()


def _flat_alpha(key: str) -> str:
    """The layer of an ``.alpha``, its dots as underscores."""
    name = key.removesuffix(".alpha").removeprefix("model.")
    return name.removeprefix("lora_unet_").removeprefix("diffusion_model.").replace(".", "_")
