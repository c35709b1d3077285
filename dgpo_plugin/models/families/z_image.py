"""Z-Image: one stream of text and picture tokens, a language model's hidden states as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen3Model

from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning, as_chat
from dgpo_plugin.models.pipeline import PipelineModel


class ZImageModel(PipelineModel):
    """Z-Image, of diffusers' ``ZImagePipeline``."""

    pipeline_class = ZImagePipeline
    component_classes = {"transformer": ZImageTransformer2DModel, "vae": AutoencoderKL, "text_encoder": Qwen3Model}
    architecture = "z-image"
    kohya_version = "z_image"
    linear_sigmas = True
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    def latent_channels(self) -> int:
        return int(self.denoiser.in_channels)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        # Padded to the greatest length, with the true lengths beside.
        length = self.config.max_sequence_length
        rows, _ = self.pipeline.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        context = torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows])
        return Conditioning({"context": context, "length": torch.tensor([len(row) for row in rows])})

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        return super().token_counts(tokenizer, [as_chat(tokenizer, text, thinking=True) for text in texts])

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"context": (self.config.max_sequence_length, self.denoiser.config.cap_feat_dim), "length": ()}

    def timestep(self, sigma: float) -> float:
        return 1 - sigma

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        context, lengths = tensors["context"], tensors["length"]
        # Read once: each number asked for would wait for the device.
        counts = [context.shape[1]] * len(context) if lengths.device.type == "meta" else lengths.tolist()
        rows = [row[:n] for row, n in zip(context, counts, strict=True)]
        # The pipeline's time runs the other way, and so does its velocity.
        time = self.timesteps(sigma, latents)
        predicted = self.denoiser(list(latents.to(context.dtype).unsqueeze(2)), time, rows, return_dict=False)[0]
        return -torch.stack([each.float() for each in predicted]).squeeze(2)
