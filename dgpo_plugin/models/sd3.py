"""Stable Diffusion 3 and 3.5: joint-attention transformer, two CLIP encoders and T5, flow matching."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging as transformers_logging

from dgpo_plugin.config import ModelConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.models.base import dtype_of
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.memory import at_work, empty_module, load_quantized, offload_each


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

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, config: ModelConfig, identity: dict[str, str], device: torch.device
    ) -> None:
        pipeline.set_progress_bar_config(disable=True)
        if config.tiled_decode:
            pipeline.vae.enable_tiling()
            pipeline.vae.enable_slicing()
        self.pipeline = pipeline
        self.identity = identity
        self.denoiser = pipeline.transformer.requires_grad_(False).eval()
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        for part in (pipeline.vae, *self.encoders):
            part.requires_grad_(False).eval()
        factor = pipeline.vae_scale_factor
        self.resolution = config.resolution or pipeline.default_sample_size * factor
        if self.resolution % (factor * pipeline.patch_size):
            raise UserError(f"model.resolution {self.resolution}: must be a multiple of {factor * pipeline.patch_size}")
        side = self.resolution // factor
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self._max_sequence_length = config.max_sequence_length
        self.device = device

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, identity: dict[str, str], device: torch.device) -> SD3Model:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            replaced = {}
            if config.quantization is not None:
                replaced["transformer"] = load_quantized(SD3Transformer2DModel, folder, config, device)
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                folder, dtype=dtype_of(config), local_files_only=True, **replaced
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model {config.path}: cannot be loaded ({str(error).splitlines()[0]})") from error
        # Convolutions are faster with channels last, on CPUs and GPUs alike; the numbers are the same.
        pipeline.vae.to(memory_format=torch.channels_last)
        model = cls(pipeline, config, identity, device)
        if config.offload:
            offload_each(model.encoders, device)
        else:
            for part in (model.vae, *model.encoders):
                part.to(device)
            # A quantized denoiser is placed as it is loaded, one to be split as it is split.
            if config.quantization is None and not config.shard:
                model.denoiser.to(device)
        return model

    @classmethod
    def skeleton(cls, folder: Path, config: ModelConfig) -> SD3Model:
        parts = {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        }
        pipeline = StableDiffusion3Pipeline(
            **{name: empty_module(kind, folder / name, dtype_of(config)) for name, kind in parts.items()},
            scheduler=None,
            tokenizer=None,
            tokenizer_2=None,
            tokenizer_3=None,
        )
        tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        pipeline.tokenizer_max_length = tokenizer["model_max_length"]
        return cls(pipeline, config, {"path": config.path, "weights_hash": ""}, torch.device("meta"))

    def blank_conditioning(self, count: int) -> Conditioning:
        tokens = self.pipeline.tokenizer_max_length + self._max_sequence_length
        dims = self.denoiser.config
        blank = torch.zeros(count, dims.pooled_projection_dim, dtype=self.denoiser.dtype)
        context = torch.zeros(count, tokens, dims.joint_attention_dim, dtype=self.denoiser.dtype)
        return Conditioning({"context": context, "pooled": blank})

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditioning({"context": context, "pooled": pooled})

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        timestep = torch.full((len(latents),), sigma * 1000, device=latents.device)
        asked = conditioning.tensors
        predicted: Tensor = self.denoiser(
            hidden_states=latents.to(asked["context"].dtype),
            encoder_hidden_states=asked["context"],
            pooled_projections=asked["pooled"],
            timestep=timestep,
            return_dict=False,
        )[0]
        return predicted.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with at_work([vae], latents.device):
            decoded: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        changes = {} if shift is None else {"shift": shift}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config, **changes)
        scheduler.set_timesteps(steps)
        return [float(sigma) for sigma in scheduler.sigmas]
