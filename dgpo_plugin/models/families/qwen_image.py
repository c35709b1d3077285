"""Qwen-Image: packed latents, a vision-language model's hidden states as conditions, a video VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLForConditionalGeneration

from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.flux import pack, unpack
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel


class QwenImageModel(PipelineModel):
    """Qwen-Image, of diffusers' ``QwenImagePipeline``; latents stay pictures, and are packed for the denoiser."""

    pipeline_class = QwenImagePipeline
    component_classes = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    architecture = "qwen-image"
    kohya_version = "qwen_image"
    lora_targets = ATTENTION

    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        # Padded to the greatest length, so that prompts of all lengths lie in one table.
        length = self.config.max_sequence_length
        context, mask = self.pipeline.encode_prompt(prompt=list(texts), device=self.device, max_sequence_length=length)
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        missing = length - context.shape[1]
        return Conditioning({"context": pad(context, (0, 0, 0, missing)), "mask": pad(mask, (0, missing))})

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        # QwenImagePipeline._get_qwen_prompt_embeds: what stands before the text is dropped again.
        template, dropped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        counts = super().token_counts(tokenizer, [template.format(text) for text in texts])
        return [count - dropped for count in counts]

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"context": (length, self.denoiser.config.joint_attention_dim), "mask": (length,)}

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        context, mask = tensors["context"], tensors["mask"]
        padded = False
        if mask.device.type != "meta":
            lengths = mask.sum(1).tolist()  # read once: each number asked for would wait for the device
            context, mask = context[:, : max(lengths)], mask[:, : max(lengths)]
            padded = min(lengths) != max(lengths)
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        predicted: Tensor = self.denoiser(
            hidden_states=pack(latents).to(context.dtype),
            timestep=self.timesteps(sigma, latents).to(context.dtype),
            guidance=self.embedded_guidance(latents),
            encoder_hidden_states=context,
            encoder_hidden_states_mask=mask if padded else None,
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(predicted.float(), height, width)

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        # As its pipeline does: the guided velocity of each token has the length of the prompt's own.
        combined = pack(super().guided(without, with_prompt, guidance))
        own = pack(with_prompt)
        scaled = combined * (own.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        return unpack(scaled, without.shape[2] // 2, without.shape[3] // 2)

    def unscaled(self, latents: Tensor) -> Tensor:
        vae = self.vae.config
        mean, std = (torch.tensor(values, device=latents.device) for values in (vae.latents_mean, vae.latents_std))
        return (latents * std[:, None, None] + mean[:, None, None])[:, :, None]

    def scaled(self, latents: Tensor) -> Tensor:
        vae = self.vae.config
        mean, std = (torch.tensor(values, device=latents.device) for values in (vae.latents_mean, vae.latents_std))
        return (latents - mean[:, None, None]) / std[:, None, None]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return super().encode_pixels(pixels[:, :, None])[:, :, 0]
