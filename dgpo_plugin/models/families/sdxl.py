"""Stable Diffusion XL: a U-Net that predicts noise (or v), two CLIP encoders, sizes and crop as conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.noise_prediction import NoisePredictingModel


class SDXLModel(NoisePredictingModel):
    """Stable Diffusion XL, of diffusers' ``StableDiffusionXLPipeline``."""

    pipeline_class = StableDiffusionXLPipeline
    component_classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    architecture = "stable-diffusion-xl-v1-base"
    kohya_version = "sdxl_base_v1-0"

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            # What the pipeline guides away from when no negative prompt is given.
            nonempty = torch.tensor([bool(text) for text in texts], device=context.device)
            context, pooled = context * nonempty[:, None, None], pooled * nonempty[:, None]
        return Conditioning({"context": context, "pooled": pooled})

    def unscaled(self, latents: Tensor) -> Tensor:
        # As the pipeline decodes (StableDiffusionXLPipeline.__call__).
        known = self._statistics(latents)
        if known is None:
            return super().unscaled(latents)
        mean, std = known
        return latents * std / float(self.vae.config.scaling_factor) + mean

    def scaled(self, latents: Tensor) -> Tensor:
        # As StableDiffusionXLImg2ImgPipeline.prepare_latents encodes.
        known = self._statistics(latents)
        if known is None:
            return super().scaled(latents)
        mean, std = known
        return (latents - mean) * float(self.vae.config.scaling_factor) / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and width of latents' channels, (1, C, 1, 1), where the VAE knows them."""
        vae = self.vae.config
        if vae.get("latents_mean") is None or vae.get("latents_std") is None:
            return None
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (vae.latents_mean, vae.latents_std)
        )
        return mean, std

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, width = self.encoders[0].config.max_position_embeddings, self.denoiser.config.cross_attention_dim
        return {"context": (tokens, width), "pooled": (self.encoders[1].config.projection_dim,)}

    def predict(self, noisy: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        # Original size, crop's corner, target size, each the height first (StableDiffusionXLPipeline.__call__): a
        # picture of this size, not cropped. Written on the device: sent there, they would be waited for in every pass.
        sizes = torch.zeros(len(noisy), 6, device=noisy.device, dtype=noisy.dtype)
        sizes[:, 0::4].fill_(float(self.height))
        sizes[:, 1::4].fill_(float(self.width))
        predicted: Tensor = self.denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=tensors["context"],
            added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
        return predicted
