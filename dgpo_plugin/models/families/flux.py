"""FLUX.1 (dev, schnell, Krea): packed latents, CLIP's pooled vector and T5's tokens, distilled guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel, T5EncoderModel

from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.attention import even_gradients
from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel


class FluxModel(PipelineModel):
    """FLUX.1, of diffusers' ``FluxPipeline``; latents stay pictures, (C, H, W), and are packed for the denoiser."""

    pipeline_class = FluxPipeline
    component_classes = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    lora_targets = ATTENTION
    kohya_version = "flux1"
    text_readers = ("text_encoder_2",)

    def __init__(self, pipeline: Any, config: ModelConfig, folder: Path, device: torch.device) -> None:
        super().__init__(pipeline, config, folder, device)
        # The single blocks put attention's output beside their other half, and so get a slice of a gradient back.
        even_gradients(self.denoiser)

    def variant(self) -> tuple[str, str]:
        """kohya's rule (sd-scripts, ``flux_utils``): what is told no guidance is schnell."""
        return "flux-1-dev" if self.denoiser.config.guidance_embeds else "flux-1-schnell", self.kohya_version

    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return Conditioning({"context": context, "pooled": pooled})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        dims = self.denoiser.config
        context = (self.config.max_sequence_length, dims.joint_attention_dim)
        return {"context": context, "pooled": (dims.pooled_projection_dim,)}

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        dtype, device = tensors["context"].dtype, latents.device
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        # Counted on the device: sent there, they would be waited for in every pass.
        counted = (torch.arange(side, device=device, dtype=dtype) for side in (height, width))
        rows, columns = torch.meshgrid(*counted, indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        predicted: Tensor = self.denoiser(
            hidden_states=pack(latents).to(dtype),
            timestep=self.timesteps(sigma, latents).to(dtype),
            guidance=self.embedded_guidance(latents),
            pooled_projections=tensors["pooled"],
            encoder_hidden_states=tensors["context"],
            txt_ids=torch.zeros(tensors["context"].shape[1], 3, device=device, dtype=dtype),
            img_ids=positions,
            return_dict=False,
        )[0]
        return unpack(predicted.float(), height, width)


def pack(latents: Tensor) -> Tensor:
    """Latents (N, C, 2 h, 2 w) as tokens (N, h w, 4 C), one for every two by two of them."""
    # Contiguous, as the denoiser's own pipeline gives them: a product of strided tokens may round differently.
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (N, h w, 4 C) as latents (N, C, 2 h, 2 w), the inverse of :func:`pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)
