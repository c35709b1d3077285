"""A tiny random Mask2Former and CLIP in real folders, and pictures for them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from dgpo_plugin.prompts.geneval import OBJECTS
from tests.dgpo_plugin.families import SHAPES

LABELS = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "couch": "sofa"}
"""Some of the hub's spellings."""


def tiny_mask2former(folder: Path, *, sure_of: str = "dog") -> Path:
    """All of whose queries find one class, in places that depend on the picture."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={number: LABELS.get(name, name) for number, name in enumerate(OBJECTS)},
    )
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    network.class_predictor.bias.data[OBJECTS.index(sure_of)] = 8.0
    network.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHAPES / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=4.0)
    network = transformers.CLIPModel(config)
    for parameter in network.vision_model.encoder.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4  # so that different pictures get different colors
    network.save_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    return folder


def pictures(number: int, height: int = 48, width: int = 48) -> Tensor:
    """Smooth and 8-bit."""
    coarse = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255
