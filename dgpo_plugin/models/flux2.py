"""FLUX.2 klein: latents in two-by-two patches, normalised by the VAE's own statistics, Qwen3's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen3ForCausalLM

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel, filled


class Flux2KleinModel(PipelineModel):
    """See :class:`dgpo_plugin.models.base.Model`. Latents are patches here: (4 C, H / 2, W / 2), a token each."""

    pipeline_class = Flux2KleinPipeline
    parts = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2, "text_encoder": Qwen3ForCausalLM}
    architecture = "flux-2-klein"
    lora_targets = (*ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")

    def pixels_a_latent(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def latents_a_token(self) -> int:
        return 1

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        context, _ = self.pipeline.encode_prompt(
            prompt=list(texts), device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return Conditioning({"context": context})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"context": (self.config.max_sequence_length, self.denoiser.config.joint_attention_dim)}

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        context = conditioning.tensors["context"]
        count, channels, height, width = latents.shape
        # Places are (time, row, column, position in the text).
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        nought = torch.zeros_like(rows)
        picture = torch.stack([nought, rows, columns, nought], dim=-1).flatten(0, 1)
        text = torch.zeros(context.shape[1], 4, dtype=picture.dtype)
        text[:, 3] = torch.arange(context.shape[1])
        predicted: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2).to(context.dtype),
            timestep=filled(sigma, latents).to(context.dtype),
            guidance=None,
            encoder_hidden_states=context,
            txt_ids=text.to(latents.device).expand(count, -1, -1),
            img_ids=picture.to(latents.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return predicted.float().transpose(1, 2).reshape(count, channels, height, width)

    def dynamic_shift(self, steps: int) -> float:
        return float(compute_empirical_mu(image_seq_len=self.latent_shape[1] * self.latent_shape[2], num_steps=steps))

    def unscaled(self, latents: Tensor) -> Tensor:
        statistics = self.vae.bn
        mean = statistics.running_mean.to(latents.device)[:, None, None]
        std = (statistics.running_var.to(latents.device) + self.vae.config.batch_norm_eps).sqrt()[:, None, None]
        # (4 C, h, w) -> (C, 2 h, 2 w)
        return torch.nn.functional.pixel_shuffle(latents * std + mean, 2)
