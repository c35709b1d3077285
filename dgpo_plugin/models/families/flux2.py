"""FLUX.2: latents in two-by-two patches, normalised by the VAE's own statistics, a language model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning, as_chat
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel


class _Flux2Model(PipelineModel):
    """What both FLUX.2 have in common: latents are patches, (4 C, H / 2, W / 2), each a token of its own."""

    lora_targets = (*ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")

    def pixels_per_latent(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def latents_per_token(self) -> int:
        return 1

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, _ = self.pipeline.encode_prompt(
            prompt=list(texts), device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return Conditioning({"context": context})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"context": (self.config.max_sequence_length, self.denoiser.config.joint_attention_dim)}

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        context = conditioning.tensors["context"]
        count, channels, height, width = latents.shape
        # A position is (time, row, column, position in the text).
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        zeros = torch.zeros_like(rows)
        picture = torch.stack([zeros, rows, columns, zeros], dim=-1).flatten(0, 1)
        text = torch.zeros(context.shape[1], 4, dtype=picture.dtype)
        text[:, 3] = torch.arange(context.shape[1])
        predicted: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2).to(context.dtype),
            timestep=self.timesteps(sigma, latents).to(context.dtype),
            guidance=self.embedded_guidance(latents),
            encoder_hidden_states=context,
            txt_ids=text.to(latents.device).expand(count, -1, -1),
            img_ids=picture.to(latents.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return predicted.float().transpose(1, 2).reshape(count, channels, height, width)

    def dynamic_shift(self, steps: int) -> float:
        return float(compute_empirical_mu(image_seq_len=self.latent_shape[1] * self.latent_shape[2], num_steps=steps))

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        # (N, 4 C, h, w) -> (N, C, 2 h, 2 w)
        return pixel_shuffle(latents * std + mean, 2)

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (pixel_unshuffle(latents, 2) - mean) / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and width of the patches' channels, (4 C, 1, 1)."""
        known = self.vae.bn
        mean = known.running_mean.to(latents.device)[:, None, None]
        return mean, (known.running_var.to(latents.device) + self.vae.config.batch_norm_eps).sqrt()[:, None, None]


class Flux2KleinModel(_Flux2Model):
    """FLUX.2 klein: Qwen3's hidden states, true guidance where it is not distilled."""

    pipeline_class = Flux2KleinPipeline
    component_classes = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Qwen3ForCausalLM,
    }

    def variant(self) -> tuple[str, str]:
        size = {24: "4b", 32: "9b"}.get(self.denoiser.config.num_attention_heads)
        return ("flux-2-klein", "flux_2_klein") if size is None else (f"flux-2-klein-{size}", f"flux_2_klein_{size}")

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        return super().token_counts(tokenizer, [as_chat(tokenizer, text, thinking=False) for text in texts])


class Flux2DevModel(_Flux2Model):
    """FLUX.2 dev: Mistral's hidden states, guidance embedded."""

    pipeline_class = Flux2Pipeline
    component_classes = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Mistral3ForConditionalGeneration,
    }
    architecture = "flux-2-dev"
    kohya_version = "flux_2_dev"

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        chats = format_input(prompts=texts, system_message=SYSTEM_MESSAGE)
        return [len(tokens) for tokens in tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]]

    @classmethod
    def component_overrides(cls, folder: Path) -> dict[str, Any]:
        # The tokenizer alone: the processor round it is for pictures, and needs torchvision.
        return {"tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)}
