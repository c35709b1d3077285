"""Stable Diffusion 3 and 3.5: joint-attention transformer, two CLIP encoders and T5, flow matching."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import ATTENTION, PipelineModel, per_image


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
    architecture = "stable-diffusion-3-medium"
    lora_targets = ATTENTION

    def latents_per_token(self) -> int:
        return int(self.pipeline.patch_size)

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

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        predicted: Tensor = self.denoiser(
            hidden_states=latents.to(tensors["context"].dtype),
            encoder_hidden_states=tensors["context"],
            pooled_projections=tensors["pooled"],
            timestep=per_image(sigma * 1000, latents),
            return_dict=False,
        )[0]
        return predicted.float()
