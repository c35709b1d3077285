"""FLUX.1 (dev, schnell, Krea): packed latents, CLIP's pooled vector and T5's tokens, distilled guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel, filled


class FluxModel(PipelineModel):
    """See :class:`dgpo_plugin.models.base.Model`."""

    pipeline_class = FluxPipeline
    parts = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    architecture = "flux-1-dev"
    lora_targets = ATTENTION

    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    def ask_encoders(self, texts: Sequence[str]) -> Conditioning:
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

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        asked = conditioning.tensors
        dtype, device = asked["context"].dtype, latents.device
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        # Counted on the device: sent there, they would be waited for in every pass.
        counted = (torch.arange(side, device=device, dtype=dtype) for side in (height, width))
        rows, columns = torch.meshgrid(*counted, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        predicted: Tensor = self.denoiser(
            hidden_states=pack(latents).to(dtype),
            timestep=filled(sigma, latents).to(dtype),
            guidance=self.embedded_guidance(latents),
            pooled_projections=asked["pooled"],
            encoder_hidden_states=asked["context"],
            txt_ids=torch.zeros(asked["context"].shape[1], 3, device=device, dtype=dtype),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack(predicted.float(), height, width)


def pack(latents: Tensor) -> Tensor:
    """(N, C, 2 h, 2 w) -> (N, h w, 4 C): a token for every two by two latents."""
    count, channels, height, width = latents.shape
    split = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(count, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, h w, 4 C) -> (N, C, 2 h, 2 w)."""
    count, _, channels = tokens.shape
    split = tokens.view(count, height, width, channels // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, 2 * height, 2 * width)
