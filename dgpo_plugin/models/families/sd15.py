"""Stable Diffusion 1.x and 2.x: a U-Net that predicts noise (or v), one CLIP encoder."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.noise_prediction import NoisePredictingModel


class SD15Model(NoisePredictingModel):
    """Stable Diffusion 1.x and 2.x, of diffusers' ``StableDiffusionPipeline``."""

    pipeline_class = StableDiffusionPipeline
    component_classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    # Training judges pictures itself; the checker would only take memory.
    load_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @property
    def _is_second(self) -> bool:
        """Whether it is a 2.x: 1024 features a token; of no published size, by linear projections or predicting v."""
        dims = self.denoiser.config
        published = dims.cross_attention_dim in (768, 1024)
        second = dims.cross_attention_dim == 1024 if published else dims.use_linear_projection
        return bool(second) or (not published and self.prediction == "v_prediction")

    def variant(self) -> tuple[str, str]:
        v = self.prediction == "v_prediction"
        if self._is_second:
            return f"stable-diffusion-v2-{'768-v' if v else '512'}", f"sd_v2{'_v' if v else ''}"
        return "stable-diffusion-v1", f"sd_v1{'_v' if v else ''}"

    def described(self) -> dict[str, str]:
        # A1111 tells 2.x from 1.x by this field (extensions-builtin/Lora/network.py).
        return {**super().described(), "ss_v2": str(self._is_second)}

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        context, _ = self.pipeline.encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning({"context": context})

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.encoders[0].config.max_position_embeddings
        return {"context": (tokens, self.denoiser.config.cross_attention_dim)}

    def predict(self, noisy: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = self.denoiser(
            noisy, timesteps, encoder_hidden_states=tensors["context"], return_dict=False
        )[0]
        return predicted
