"""Stable Diffusion 3 and 3.5: joint-attention transformer, two CLIP encoders and T5, flow matching."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dgpo_plugin.common.public_names import public_name
from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.sd3_names import sd3_names
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel


class SD3Model(PipelineModel):
    """Stable Diffusion 3 and 3.5, of diffusers' ``StableDiffusion3Pipeline``."""

    pipeline_class = StableDiffusion3Pipeline
    component_classes = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    optional_parts = ("text_encoder_3",)  # people leave the T5 out to save memory; its tokens are then zeros
    lora_targets = ATTENTION

    def variant(self) -> tuple[str, str]:
        """kohya's rule (sd-scripts, ``sd3_utils``): 3.5 normalizes queries and keys, its medium has dual attention.

        The names of 3.5 are those in the headers of Stability's own files; turbo differs from large in name alone, and
        so do models of no published size from each other.
        """
        dims, name = self.denoiser.config, re.sub(r"[^a-z0-9]", "", public_name(self.config.path).lower())
        if dims.dual_attention_layers or (dims.qk_norm and "35medium" in name):
            return "stable-diffusion-v3.5-medium", "3-5-medium"
        if dims.qk_norm and (dims.num_layers == 38 or "35large" in name):
            return f"stable-diffusion-v3.5-large{'-turbo' if 'turbo' in name else ''}", "3-5-large"
        return "stable-diffusion-3-medium", "3-medium"

    def latents_per_token(self) -> int:
        return int(self.pipeline.patch_size)

    def largest_side(self) -> int:
        # diffusers' PatchEmbed cuts a picture's positions out of the middle of a square of so many tokens.
        return int(self.denoiser.config.pos_embed_max_size) * self.latents_per_token() * self.pixels_per_latent()

    def diffusers_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().diffusers_names(sd3_names(tensors, self.denoiser.config.num_layers))

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return Conditioning({"context": context, "pooled": pooled})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.pipeline.tokenizer_max_length + self.config.max_sequence_length
        dims = self.denoiser.config
        return {"context": (tokens, dims.joint_attention_dim), "pooled": (dims.pooled_projection_dim,)}

    def timestep(self, sigma: float) -> float:
        return sigma * 1000

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        predicted: Tensor = self.denoiser(
            hidden_states=latents.to(tensors["context"].dtype),
            encoder_hidden_states=tensors["context"],
            pooled_projections=tensors["pooled"],
            timestep=self.timesteps(sigma, latents),
            return_dict=False,
        )[0]
        return predicted.float()
