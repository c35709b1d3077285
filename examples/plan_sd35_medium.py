"""What training Stable Diffusion 3.5 Medium at 512 pixels takes, on which GPU: `python examples/plan_sd35_medium.py`.

From the published shapes of its parts, without the (gated) weights. With access to the model the same numbers come
from `dgpo plan my.yaml --memory 16` where my.yaml says `model: {path: stabilityai/stable-diffusion-3.5-medium}`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dgpo_plugin.cli import quieten
from dgpo_plugin.config import RunConfig, parse_config
from dgpo_plugin.plan import GIB, RESERVE, make_plan

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
PARTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {**CLIP_L, "projection_dim": 768, "vocab_size": 49408},
    "text_encoder_2": {**CLIP_G, "projection_dim": 1280, "vocab_size": 49408},
    "text_encoder_3": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
SIZES = (1, 2, 4, 8, 12, 24)
SAVINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("as it is", {}, {}),
    ("offload", {"offload": True}, {}),
    ("and checkpointing", {"offload": True}, {"gradient_checkpointing": True}),
    ("and nf4", {"offload": True, "quantization": "bitsandbytes-nf4"}, {"gradient_checkpointing": True}),
]


def write_configurations(folder: Path) -> None:
    """A diffusers folder with no weights in it."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    for name, values in PARTS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


def configuration(folder: Path, micro_batch_size: int, model: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    """The paper's larger geometry: 24 groups of 24, LoRA of rank 64, 512 pixels, bf16."""
    values = {
        "model": {"path": str(folder), "precision": "bf16", "resolution": 512, **model},
        "lora": {"rank": 64, "alpha": 128},
        "training": {
            "prompts_per_iteration": 24,
            "group_size": 24,
            "micro_batch_size": micro_batch_size,
            **training,
        },
    }
    return parse_config(values, "example")


def main() -> None:
    """Print a row for each way to save memory, and the micro-batch that each GPU has room for."""
    quieten()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_configurations(folder)
        print(
            f"{'':<18} {'micro-batch 1':>14} {'micro-batch 8':>14}   largest of 1, 2, 4, 8, 12, 24 in 12 / 16 / 24 GiB"
        )
        for label, model, training in SAVINGS:
            plans = {size: make_plan(configuration(folder, size, model, training)) for size in SIZES}
            fits = []
            for gib in (12, 16, 24):
                room = [size for size, plan in plans.items() if plan.peak <= gib * GIB * (1 - RESERVE)]
                fits.append(str(max(room)) if room else "-")
            one, eight = plans[1].peak / GIB, plans[8].peak / GIB
            print(f"{label:<18} {one:>10.1f} GiB {eight:>10.1f} GiB   {' / '.join(fits)}")


if __name__ == "__main__":
    main()
