"""A published model of full size with random weights, drawn on the device: its speed and memory without a download."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.memory import load_quantized
from dgpo_plugin.models.parts import empty_module
from dgpo_plugin.models.pipeline import TEXT_LENGTH_TENSORS

from .published import Published

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def random_model(
    model: Published, config: ModelConfig, device: torch.device, *, encoders: bool = True, seed: int = 0
) -> Model:
    """A model as :func:`dgpo_plugin.models.load.load_model` would make it of the real weights, with random ones.

    Part after part is drawn on the device, and leaves it if it is to be offloaded. A denoiser that is to be quantized
    is written to disk first and loaded from there, as any other is.

    Args:
        encoders: whether to have the text encoders and the VAE; nothing but the denoiser can be used without.
    """
    family = family_of(model)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.write_configurations(folder)
        dtypes = family.dtypes(config)
        modules: dict[str, nn.Module | None] = {}
        for part, kind in family.component_classes.items():
            if part not in model.parts:
                modules[part] = None
                continue
            needed = encoders or part == family.prefix
            # The VAE's and the encoders' configurations are read even where their weights are not needed.
            home = device if needed else torch.device("meta")
            with home, _default_dtype(dtypes[part]):
                # Tables that its code builds in main memory follow.
                made = empty_module(kind, folder / part, dtypes[part]).to(home)
            if part == family.prefix and config.quantization is not None:
                made = _quantized(kind, made, config, device, folder / "quantized")
            elif config.offload and needed:
                made.to("cpu")
            modules[part] = made
        assembled: Any = family.assembled(folder, config, modules, device)
    pipeline = assembled.pipeline
    slots = [slot for slot in TOKENIZERS if slot in inspect.signature(type(pipeline)).parameters]
    for slot in slots:
        is_clip = getattr(pipeline, slot.replace("tokenizer", "text_encoder"), None).__class__.__name__.startswith(
            "CLIP"
        )
        pipeline.register_modules(**{slot: byte_tokenizer(77 if is_clip else 4096)})
    if not any(p.ndim > 4 for p in assembled.vae.parameters()):
        assembled.vae.to(memory_format=torch.channels_last)
    result: Model = assembled
    return result


def family_of(model: Published) -> Any:
    """The family that runs a published model's pipeline class."""
    return FAMILIES.load(model.pipeline)


def random_conditioning(model: Model, texts: int) -> Conditioning:
    """Conditioning of normal noise in the shape of the text encoders' output, for texts of as many tokens as fit."""
    blank = model.blank_conditioning(texts)

    def drawn(name: str, zeros: Tensor) -> Tensor:
        if name == "length":
            return torch.full_like(zeros, model.blank_conditioning(1).table["context"].shape[1])
        return torch.ones_like(zeros) if name in TEXT_LENGTH_TENSORS else torch.randn_like(zeros)

    return Conditioning({name: drawn(name, zeros) for name, zeros in blank.table.items()}).on(model.device)


def byte_tokenizer(longest: int) -> Any:
    """A tokenizer whose tokens are bytes: any text, no download.

    It stands in for every tokenizer; the networks do the same work.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=longest
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def _quantized(kind: Any, made: Any, config: ModelConfig, device: torch.device, folder: Path) -> nn.Module:
    made.save_pretrained(folder)
    del made
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return load_quantized(kind, folder, config, device).module


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have modules drawn in the type they are to have: in float32 the largest would not fit first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
