"""How many floating-point operations a denoiser's pass has: counted once, on the meta device, attention written out.

torch's counter knows no fused attention of some kinds and would leave it out. What is computed a second time
(gradient checkpointing, flash attention's backward) is work of the implementation's, and is not counted.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models.load import model_skeleton
from dgpo_plugin.models.policy import Policy

from .published import Published


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image's passes; a multiply and an add are two.

    Attributes:
        forward: through the denoiser with its adapter.
        training: forward, and backward to the adapter's weights.
    """

    forward: int
    training: int


def count_flops(model: Published, config: ModelConfig, lora: LoraConfig) -> Flops:
    """Count the operations of one image's passes at the configuration's size of pictures."""
    with tempfile.TemporaryDirectory() as name:
        model.write_configurations(Path(name))
        return skeleton_flops(config.model_copy(update={"path": name}), lora)


def skeleton_flops(config: ModelConfig, lora: LoraConfig) -> Flops:
    """Count the operations of one image's passes, from the model's configuration files alone.

    Raises:
        UserError: they are not here.
    """
    with torch.device("meta"), written_out_attention():
        skeleton = model_skeleton(config.model_copy(update={"quantization": None}))
        policy = Policy(skeleton, lora, seed=0, unconditional=skeleton.blank_conditioning(1))
        latents, conditioning = torch.zeros(1, *skeleton.latent_shape), skeleton.blank_conditioning(1)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            policy.velocity(latents, 0.5, conditioning)
        with FlopCounterMode(display=False) as training:
            policy.velocity(latents, 0.5, conditioning).square().mean().backward()
    return Flops(forward.get_total_flops(), training.get_total_flops())


@contextlib.contextmanager
def written_out_attention() -> Iterator[None]:
    """Let fused attention be computed step by step in the block, as the counter knows it."""
    functional, name = torch.nn.functional, "scaled_dot_product_attention"
    original = getattr(functional, name)

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *_rest: Any, enable_gqa: bool = False, **_options: Any
    ) -> Tensor:
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        return torch.softmax(query @ key.transpose(-2, -1), -1) @ value

    setattr(functional, name, attention)
    try:
        yield
    finally:
        setattr(functional, name, original)
