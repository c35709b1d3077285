"""Random checkpoints in the published formats of HPSv2 and ImageReward, of any size, and tokenizers for them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ClipSize:
    """Of HPSv2's network; the defaults are tiny, with two heads of the real widths."""

    vision_width: int = 160
    vision_layers: int = 2
    patch: int = 14
    side: int = 224
    text_width: int = 128
    text_layers: int = 2
    tokens: int = 77
    vocabulary: int = 49408
    embedding: int = 64


@dataclass(frozen=True)
class BlipSize:
    """Of ImageReward's network; the text encoder's width is fixed in its package."""

    vision_width: int = 128
    vision_layers: int = 2
    patch: int = 16
    side: int = 224
    text_width: int = 768
    text_layers: int = 2
    vocabulary: int = 600


VIT_H = ClipSize(1280, 32, 14, 224, 1024, 24, 77, 49408, 1024)
BLIP_L = BlipSize(1024, 24, 16, 224, 768, 12, 30524)


def random_tensors(shapes: dict[str, Shape], seed: int = 0) -> dict[str, Tensor]:
    """1/sqrt(inputs), norms near 1: differences live on. Small at the start: there the norms' constants matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        inputs = 1
        for size in shape[1:]:
            inputs *= size
        tensors[name] = torch.randn(shape, generator=generator) * (inputs**-0.5 if len(shape) > 1 else 0.1)
        if "patch_embed" in name or "conv1" in name:
            tensors[name] *= 0.1
        elif "emb" in name or "_token" in name:
            tensors[name] = torch.randn(shape, generator=generator) * 0.02
        elif len(shape) == 1 and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def hpsv2_checkpoint(path: Path, size: ClipSize, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """open_clip's names, under ``state_dict``."""
    patches = (size.side // size.patch) ** 2
    shapes: dict[str, Shape] = {
        "positional_embedding": (size.tokens, size.text_width),
        "text_projection": (size.text_width, size.embedding),
        "logit_scale": (),
        "visual.class_embedding": (size.vision_width,),
        "visual.positional_embedding": (patches + 1, size.vision_width),
        "visual.proj": (size.vision_width, size.embedding),
        "visual.conv1.weight": (size.vision_width, 3, size.patch, size.patch),
        **_norm("visual.ln_pre", size.vision_width),
        **_blocks("visual.transformer", size.vision_layers, size.vision_width),
        **_norm("visual.ln_post", size.vision_width),
        **_blocks("transformer", size.text_layers, size.text_width),
        "token_embedding.weight": (size.vocabulary, size.text_width),
        **_norm("ln_final", size.text_width),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(shapes, seed).items()}
    torch.save({"state_dict": tensors}, path)
    return path


def imagereward_checkpoint(path: Path, size: BlipSize, seed: int = 0) -> Path:
    """The tensors alone; ``med_config.json`` is written beside them."""
    vision, text = size.vision_width, size.text_width
    patches = (size.side // size.patch) ** 2
    shapes: dict[str, Shape] = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, patches + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, size.patch, size.patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
    }
    for layer in range(size.vision_layers):
        block = f"blip.visual_encoder.blocks.{layer}."
        shapes |= _norm(f"{block}norm1", vision) | _norm(f"{block}norm2", vision)
        shapes |= _linear(f"{block}attn.qkv", vision, 3 * vision) | _linear(f"{block}attn.proj", vision, vision)
        shapes |= _linear(f"{block}mlp.fc1", vision, 4 * vision) | _linear(f"{block}mlp.fc2", 4 * vision, vision)
    shapes |= _norm("blip.visual_encoder.norm", vision)
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.word_embeddings.weight"] = (size.vocabulary, text)
    shapes[f"{embeddings}.position_embeddings.weight"] = (512, text)
    shapes |= _norm(f"{embeddings}.LayerNorm", text)
    for layer in range(size.text_layers):
        block = f"blip.text_encoder.encoder.layer.{layer}."
        for kind, seen in (("attention", text), ("crossattention", vision)):
            shapes |= _linear(f"{block}{kind}.self.query", text, text)
            shapes |= _linear(f"{block}{kind}.self.key", seen, text) | _linear(f"{block}{kind}.self.value", seen, text)
            shapes |= _linear(f"{block}{kind}.output.dense", text, text) | _norm(
                f"{block}{kind}.output.LayerNorm", text
            )
        shapes |= _linear(f"{block}intermediate.dense", text, 4 * text) | _linear(
            f"{block}output.dense", 4 * text, text
        )
        shapes |= _norm(f"{block}output.LayerNorm", text)
    shapes |= _linear("blip.vision_proj", vision, 256) | _linear("blip.text_proj", text, 256)
    widths = (text, 1024, 128, 64, 16, 1)
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= _linear(f"mlp.layers.{place}", wide, narrow)
    tensors = random_tensors(shapes, seed)
    tensors[f"{embeddings}.position_ids"] = torch.arange(512)[None]
    torch.save(tensors, path)
    config = {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": text,
        "initializer_range": 0.02,
        "intermediate_size": 4 * text,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": text // 64,
        "num_hidden_layers": size.text_layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": size.vocabulary,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    path.with_name("med_config.json").write_text(json.dumps(config))
    return path


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _blocks(name: str, layers: int, width: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}."
        shapes |= _norm(f"{block}ln_1", width) | _norm(f"{block}ln_2", width)
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}attn.out_proj", width, width)
        shapes |= _linear(f"{block}mlp.c_fc", width, 4 * width) | _linear(f"{block}mlp.c_proj", 4 * width, width)
    return shapes


# ---- tokenizers


def byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2 and CLIP have them: themselves, or from code point 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def published_words(python: Path) -> list[tuple[str, str]]:
    """The merges of CLIP's vocabulary, from the package hpsv2x in that environment."""
    file = next(python.parents[1].rglob("open_clip/bpe_simple_vocab_16e6.txt.gz"))
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]


def clip_tokenizer(folder: Path, merges: Sequence[tuple[str, str]]) -> Path:
    """CLIP's, with these merges; the two marks at the end of the vocabulary."""
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {word: place for place, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=list(merges)).save_pretrained(folder)
    return folder


def bert_tokenizer(folder: Path) -> Path:
    """BERT's, with every ASCII letter, and some words and endings of the tests' prompts."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["a", "red", "circle", "two", "cat", "dog", "the", "##s", "##ing", "photo", "sign", "cafe", "of", "house"]
    vocabulary = [*marks, *letters, *("##" + letter for letter in letters), *words]
    BertTokenizer(vocab={word: place for place, word in enumerate(dict.fromkeys(vocabulary))}).save_pretrained(folder)
    return folder
