"""The tiny model that is shipped with the library, as ComfyUI's MODEL, CLIP and VAE.

Its transformer runs in ComfyUI's own Stable Diffusion 3 code. Its text encoders (width 64) and its VAE (8 channels) are
smaller than any that ComfyUI can recognize, so diffusers and transformers run those two.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.load import world_pipeline

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@functools.lru_cache(maxsize=1)
def _pipeline() -> Any:
    """The library's own loaded model, whose text encoders and VAE run here."""
    with torch.inference_mode(False):
        # As in the presets: its third encoder says nothing, one token of it is enough and many times faster.
        return load_model(ModelConfig(path="shapes", max_sequence_length=1))


class ShapesText:
    """A CLIP as far as CLIP Text Encode and our nodes need one."""

    def tokenize(self, text: str, **_options: object) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_options: object) -> list[list[Any]]:
        encoded = _pipeline().encode([tokens]).tensors
        return [[encoded["context"], {"pooled_output": encoded["pooled"]}]]


class ShapesVAE:
    """A VAE as far as VAE Decode, VAE Encode and our nodes need one."""

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Latents (N, 16, h, w) as the VAE made them -> pictures (N, 8 h, 8 w, 3) in [0, 1]."""
        vae = _pipeline().vae
        decoded: Tensor = vae.decode(samples.to(vae.device, vae.dtype), return_dict=False)[0]
        pictures = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pictures.movedim(1, -1).cpu()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures (N, H, W, 3) in [0, 1] -> latents (N, 16, H / 8, W / 8), the distribution's mode."""
        vae = _pipeline().vae
        pictures = pixels[..., :3].movedim(-1, 1).to(vae.device, vae.dtype) * 2 - 1
        latents: Tensor = vae.encode(pictures).latent_dist.mode()
        return latents.float().cpu()


def load_shapes_transformer() -> Any:
    """The shipped transformer as ComfyUI's MODEL, in float32."""
    return load_transformer(str(world_pipeline("shapes") / TRANSFORMER))


def load_transformer(file: str) -> Any:
    """A diffusers SD3 transformer as ComfyUI's MODEL, in float32.

    UNETLoader takes a Stable Diffusion 3 to have as many layers as heads of 64, as all published ones do. This one has
    4 layers and 2 heads, which ComfyUI's network can be told, but its loader cannot.
    """
    weights = comfy.utils.load_torch_file(file)
    layers = len({key.split(".")[1] for key in weights if key.startswith("transformer_blocks.")})
    weights = comfy.model_detection.convert_diffusers_mmdit(weights)
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.unet_config["num_blocks"] = layers
    # The last layer has scale and shift the other way round in diffusers; the conversion turned those of the layer
    # that it takes for the last, and turning halves twice leaves them as they were.
    for layer in {config.unet_config["depth"] - 1, layers - 1}:
        for parameter in ("weight", "bias"):
            key = f"joint_blocks.{layer}.context_block.adaLN_modulation.1.{parameter}"
            weights[key] = torch.cat(weights[key].chunk(2)[::-1])
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model(weights, "")
    network.load_model_weights(weights, "")
    network.latent_format = shapes_latents()
    management = comfy.model_management
    model = comfy.model_patcher.ModelPatcher(
        network, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    # Where ComfyUI keeps how to load a model again: also what tells which file it came from.
    model.cached_patcher_init = (load_transformer, (file,))
    return model


def shapes_latents() -> Any:
    """Stable Diffusion 3's latents, but with the scale and the shift of this VAE, and no colors known for previews."""
    settings, latents = _pipeline().vae.config, comfy.latent_formats.SD3()
    latents.scale_factor, latents.shift_factor = settings.scaling_factor, settings.shift_factor
    latents.latent_rgb_factors = latents.latent_rgb_factors_bias = latents.taesd_decoder_name = None
    return latents
