"""The face that every family shows to the rest of the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, Schedule
from dgpo_plugin.models.conditioning import Conditioning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The frozen weights' type; float32, the larger, for an ``auto`` that is not settled, as in a plan."""
    return DTYPES["fp32" if config.precision == "auto" else config.precision]


class Model(Protocol):
    """A loaded base model.

    Attributes:
        denoiser: the network that the adapter is attached to.
        vae, encoders: what else has weights.
        prefix: the denoiser's folder (``transformer``).
        lora_targets: module name endings that get an adapter by default.
        architecture: ModelSpec's name of the base.
        latent_shape: of one image, without the batch axis.
        device: where latents and conditioning belong.
        identity: ``path`` and ``weights_hash`` of the base, as written into adapters.
    """

    denoiser: nn.Module
    vae: nn.Module
    encoders: list[nn.Module]
    prefix: str
    lora_targets: tuple[str, ...]
    architecture: str
    latent_shape: tuple[int, ...]
    resolution: int
    device: torch.device
    identity: dict[str, str]

    def place(self) -> None:
        """Put the denoiser on its device, unless something else does."""

    def encode(self, texts: Sequence[str], home: torch.device | None = None) -> Conditioning:
        """The text encoders' output, one row a text, kept on ``home``; None for the model's device."""

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The denoiser's velocity, (N, ...) like ``latents``, float32."""

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """One velocity from the empty prompt's and the prompt's; classifier-free guidance or the family's own."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), float32 in [0, 1]."""

    def tile(self) -> int | None:
        """Pixels a side of the tiles that a picture of this size is decoded in; None if it is decoded whole."""

    def blank_conditioning(self, count: int) -> Conditioning:
        """What ``encode`` would return for so many texts, of zeros."""

    def adapter_key(self, name: str) -> str:
        """An adapter file's key for ``<module>.lora_A`` or ``.lora_B``, as diffusers and ComfyUI both read it."""

    def initial_scale(self, sigma: float) -> float:
        """What standard normal noise is multiplied by to start at a schedule's first sigma; 1 for flows."""

    def error_weight(self, sigma: float) -> float:
        """The squared error of the model's own prediction over that of its velocity, at a sigma; 1 for flows."""

    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        """steps + 1 falling values, the last 0: of the pipeline's own schedule, or of DPM-Solver++'s.

        Args:
            shift: of a flow's timesteps; None for the model's own, which may grow with the picture.

        Raises:
            UserError: the model's noise levels are fixed and a shift was asked for.
        """


def guided_velocity(
    model: Model,
    latents: Tensor,
    sigma: float,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: float,
) -> Tensor:
    """The velocity under guidance g, in one pass of twice the batch; plain at g = 1.

    Args:
        unconditional: one row, the empty prompt's.
    """
    if guidance == 1:
        return model.velocity(latents, sigma, conditioning)
    empty = unconditional[torch.zeros(len(latents), dtype=torch.int64, device=latents.device)]
    both = Conditioning.concatenate([empty, conditioning])
    without, with_prompt = model.velocity(torch.cat([latents, latents]), sigma, both).chunk(2)
    return model.guided(without, with_prompt, guidance)


def refuse_seams(model: Model, config: ModelConfig) -> None:
    """Refuse pictures put together from tiles, unless told to take them: rewards look at them.

    Raises:
        UserError: they would be.
    """
    tile = model.tile()
    if tile is not None and config.tiled_decode != "accept-seams":
        raise UserError(
            f"model.tiled_decode: pictures of {model.resolution} pixels would be put together from tiles of {tile}, "
            f"with seams that rewards see; set model.sliced_decode instead, or model.tiled_decode to accept-seams"
        )
