"""Stable Diffusion 1.x and 2.x: a U-Net that predicts noise (or v), one CLIP encoder."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.noise_prediction import NoisePredictingModel
from dgpo_plugin.models.pipeline import per_image


class SD15Model(NoisePredictingModel):
    """Stable Diffusion 1.x and 2.x, of diffusers' ``StableDiffusionPipeline``."""

    pipeline_class = StableDiffusionPipeline
    component_classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    # Training judges pictures itself; the checker would only take memory.
    load_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    architecture = "stable-diffusion-v1"

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, _ = self.pipeline.encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning({"context": context})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.encoders[0].config.max_position_embeddings
        return {"context": (tokens, self.denoiser.config.cross_attention_dim)}

    def predict(self, noisy: Tensor, timestep: float, tensors: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = self.denoiser(
            noisy, per_image(timestep, noisy), encoder_hidden_states=tensors["context"], return_dict=False
        )[0]
        return predicted
