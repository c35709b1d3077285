"""Stable Diffusion 3 and 3.5: joint-attention transformer, two CLIP encoders and T5, flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from dgpo_plugin.config import ModelConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.models.base import DTYPES
from dgpo_plugin.models.conditioning import Conditioning


class SD3Model:
    """See :class:`dgpo_plugin.models.base.Model`."""

    prefix = "transformer"
    architecture = "stable-diffusion-3-medium"
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, folder: Path, config: ModelConfig, identity: dict[str, str], device: torch.device) -> None:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                folder, dtype=DTYPES[config.precision], local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model {config.path}: cannot be loaded ({str(error).splitlines()[0]})") from error
        pipeline.set_progress_bar_config(disable=True)
        # Convolutions are faster with channels last, on CPUs and GPUs alike; the numbers are the same.
        pipeline.vae.to(memory_format=torch.channels_last)
        self.pipeline = pipeline.to(device)
        self.identity = identity
        self.denoiser = pipeline.transformer.requires_grad_(False).eval()
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            part.requires_grad_(False).eval()
        factor = pipeline.vae_scale_factor
        self.resolution = config.resolution or pipeline.default_sample_size * factor
        if self.resolution % (factor * pipeline.patch_size):
            raise UserError(f"model.resolution {self.resolution}: must be a multiple of {factor * pipeline.patch_size}")
        side = self.resolution // factor
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self._max_sequence_length = config.max_sequence_length

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditioning({"context": context, "pooled": pooled})

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        timestep = torch.full((len(latents),), sigma * 1000, device=latents.device)
        predicted: Tensor = self.denoiser(
            hidden_states=latents.to(conditioning.tensors["context"].dtype),
            encoder_hidden_states=conditioning.tensors["context"],
            pooled_projections=conditioning.tensors["pooled"],
            timestep=timestep,
            return_dict=False,
        )[0]
        return predicted.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        decoded: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        changes = {} if shift is None else {"shift": shift}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config, **changes)
        scheduler.set_timesteps(steps)
        return [float(sigma) for sigma in scheduler.sigmas]
