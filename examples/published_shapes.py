"""The shapes of published models' parts, so that their plans can be made without their (often gated) files.

A denoiser without numbers has diffusers' own defaults, which are that model's. Sizes of language models are those of
their published configurations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
KL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
VAE_4 = {**KL_VAE, "latent_channels": 4, "scaling_factor": 0.18215}
VAE_16 = {
    **KL_VAE,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
UNET_SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
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
}
MISTRAL_SMALL = {
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
}
QWEN25_VL_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
    },
}
GEMMA2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
DC_AE = {
    "latent_channels": 32,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
CLIP_TOKENIZER = {"model_max_length": 77}
DDIM = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

MODELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": SD35_MEDIUM,
            "vae": {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {"transformer": {"guidance_embeds": True}, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    ),
    "black-forest-labs/FLUX.2-dev": (
        "Flux2Pipeline",
        {"transformer": {}, "vae": {}, "text_encoder": MISTRAL_SMALL},
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "Flux2KleinPipeline",
        {
            "transformer": {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
            "vae": {},
            "text_encoder": QWEN3_4B,
        },
    ),
    "Qwen/Qwen-Image": ("QwenImagePipeline", {"transformer": {}, "vae": {}, "text_encoder": QWEN25_VL_7B}),
    "Tongyi-MAI/Z-Image": ("ZImagePipeline", {"transformer": {}, "vae": VAE_16, "text_encoder": QWEN3_4B}),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (
        "SanaPipeline",
        {"transformer": {}, "vae": DC_AE, "text_encoder": GEMMA2_2B},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {"unet": UNET_SDXL, "vae": VAE_4, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {"unet": UNET_SD15, "vae": {**VAE_4, "sample_size": 512}, "text_encoder": CLIP_L},
    ),
}
"""Pipeline class, and the configuration of every part with weights, by hub id."""


def write_configurations(model: str, folder: Path) -> None:
    """A diffusers folder with no weights in it."""
    kind, parts = MODELS[model]
    index: dict[str, Any] = {"_class_name": kind}
    others: dict[str, tuple[str, dict[str, Any]]] = {}
    if "unet" in parts:
        index["scheduler"] = ["diffusers", DDIM["_class_name"]]
        others["scheduler"] = ("scheduler_config.json", DDIM)
    if parts.get("text_encoder") is CLIP_L:
        others["tokenizer"] = ("tokenizer_config.json", CLIP_TOKENIZER)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (file, values) in {**others, **{part: ("config.json", values) for part, values in parts.items()}}.items():
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(values))
