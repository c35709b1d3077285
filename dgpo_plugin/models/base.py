"""What a model is to the rest of the library, whatever its family: :class:`Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, Schedule
from dgpo_plugin.models.base_identity import BaseIdentity
from dgpo_plugin.models.conditioning import Conditioning

Sigma = float | Tensor
"""A noise level, in [0, 1], of all images; or of each, a row of what :meth:`Model.levels` makes of them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The frozen weights' type; float32, the larger, for an ``auto`` that is not settled, as in a plan."""
    return DTYPES["fp32" if config.precision == "auto" else config.precision]


@dataclass(frozen=True)
class TextLengths:
    """How long texts are to one text encoder whose tokens the denoiser reads.

    Attributes:
        encoder: its folder, as in ``text_encoder_3``.
        limit: tokens of a text that it reads; what comes after them is cut off.
        tokens: of each text.
        setting: which sets the limit; empty where it is the encoder's own.
    """

    encoder: str
    limit: int
    tokens: list[int]
    setting: str = ""


class Model(ABC):
    """A loaded base model: all that the rest of the library uses of one, whatever its family.

    Attributes:
        denoiser: the network that the adapter is attached to.
        vae, encoders: what else has weights.
        prefix: the denoiser's folder (``transformer``), and the beginning of its keys in an adapter file.
        lora_targets: module name endings that get an adapter by default.
        architecture: ModelSpec's name of the base.
        kohya_version: kohya's name of it, by which A1111 and Forge list adapters; empty where kohya has none.
        latent_shape: of one image's latents, (C, H, W), without the batch axis.
        width, height: of the pictures, in pixels.
        device: where latents and conditioning belong.
        path: as the configuration names it.
        worn: content hashes of the adapters that its denoiser wears, in their order, besides one that is trained.
    """

    prefix: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]]

    architecture: str
    kohya_version: str = ""
    denoiser: nn.Module
    vae: nn.Module
    encoders: list[nn.Module]
    latent_shape: tuple[int, ...]
    width: int
    height: int
    device: torch.device
    path: str
    worn: tuple[str, ...] = ()

    @property
    @abstractmethod
    def identity(self) -> BaseIdentity:
        """What the base is, part by part; found out at the first use.

        Raises:
            UserError: a weight file cannot be read.
        """

    @abstractmethod
    def place(self) -> None:
        """Put the denoiser on its device, unless quantizing or sharding it does."""

    @abstractmethod
    def encode(self, texts: Sequence[str], output_device: torch.device | None = None) -> Conditioning:
        """The text encoders' output, one row a text.

        Args:
            output_device: where to keep it; None for the model's device.

        Raises:
            UserError: it is not finite.
        """

    def text_lengths(self, texts: Sequence[str]) -> list[TextLengths]:  # noqa: ARG002 (others can tell)
        """How long texts are to each encoder whose tokens the denoiser reads; nothing where that is not known."""
        return []

    @abstractmethod
    def blank_conditioning(self, count: int) -> Conditioning:
        """What :meth:`encode` would return for so many texts, of zeros."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """The denoiser's velocity, (N, C, H, W) like ``latents``, float32.

        Args:
            sigma: of all of them, or N rows of :meth:`levels`.
            conditioning: N rows.
        """

    @abstractmethod
    def levels(self, sigmas: Sequence[float]) -> Tensor:
        """What :meth:`velocity` makes of noise levels, a row for each, (N, K), float32, on the model's device.

        So that images at several of them go through the denoiser together, and nothing is sent there in every pass.
        """

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """One velocity from the empty prompt's and the prompt's: v_empty + g (v_prompt - v_empty), or a family's own.

        Args:
            without, with_prompt: (N, C, H, W) each.
        """
        return without + guidance * (with_prompt - without)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, height, width) of latents (N, C, H, W), float32 in [0, 1].

        Raises:
            UserError: the latents are not finite, or the VAE makes no pictures of them.
        """

    @abstractmethod
    def encode_images(self, pictures: Tensor) -> Tensor:
        """The clean latents that the denoiser is trained on, (N, C, H, W), float32, on the model's device.

        Of what the VAE thinks of a picture it is the mean, so that a run that is gone on with sees the same numbers: as
        diffusers trains Z-Image (``examples/dreambooth/train_dreambooth_lora_z_image.py``: ``latent_dist.mode()``) and
        FLUX.2 reads pictures (``Flux2Pipeline._encode_vae_image``); the older families' scripts draw from that narrow
        distribution. The VAE computes in its own precision, as for decoding, one picture at a time: in little memory,
        and to the same bits whatever the others are.

        Args:
            pictures: (N, 3, height, width), float32 in [0, 1], on any device.

        Raises:
            UserError: the VAE makes no numbers of them.
        """

    @abstractmethod
    def tile(self) -> int | None:
        """Pixels a side of the tiles that a picture of this size is decoded in; None if it is decoded whole."""

    def adapter_key(self, name: str) -> str:
        """An adapter file's key for ``<module>.lora_A`` or ``.lora_B``, as diffusers and ComfyUI both read it."""
        return f"{self.prefix}.{name}.weight"

    def described(self) -> dict[str, str]:
        """What an adapter's header says of the base besides its names, in ModelSpec's and kohya's fields."""
        return {}

    def diffusers_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another trainer's adapter tensors under the names that diffusers gives them, ``<module>.lora_A.weight``.

        Raises:
            Exception: any, on keys that the reader does not expect.
        """
        return dict(tensors)

    @abstractmethod
    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        """A schedule's noise levels: steps + 1 falling values, the last 0.

        Args:
            shift: of a flow's timesteps towards noise; None for the model's own, which may grow with the picture.
            schedule: the pipeline's own, or DPM-Solver++'s.

        Raises:
            UserError: the model's noise levels are fixed and a shift was given.
        """

    @abstractmethod
    def training_sigmas(self) -> list[float]:
        """The thousand noise levels that the base was trained on, falling.

        A flow's are those of diffusers' training scripts (``noise_scheduler.timesteps`` as the scheduler is loaded):
        even steps, shifted by a factor that does not depend on the picture, if there is one.
        """

    def initial_scale(self, sigma: float) -> float:  # noqa: ARG002 (other families need it)
        """What standard normal noise is multiplied by to start at a schedule's first sigma; 1 for flows."""
        return 1.0

    def error_weight(self, sigma: float) -> float:  # noqa: ARG002 (other families need it)
        """The squared error of the model's own prediction over that of its velocity, at a sigma; 1 for flows."""
        return 1.0


def guided_passes(guidance: float) -> int:
    """Denoiser evaluations of one image's velocity under guidance: two, or one at 1, which is none."""
    return 1 if guidance == 1 else 2


def empty_rows(unconditional: Conditioning, latents: Tensor) -> Conditioning:
    """The empty prompt's conditioning, one row, as often as there are latents."""
    return unconditional[torch.zeros(len(latents), dtype=torch.int64, device=latents.device)]


def guided_velocity(
    model: Model,
    latents: Tensor,
    sigma: Sigma,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: float,
) -> Tensor:
    """A model's velocity under guidance g, (N, C, H, W), in one pass of twice the batch; plain at g = 1.

    Args:
        latents: (N, C, H, W).
        sigma: of all of them, or N rows of :meth:`Model.levels`.
        conditioning: N rows.
        unconditional: one row, the empty prompt's.
    """
    if guidance == 1:
        return model.velocity(latents, sigma, conditioning)
    both = Conditioning.concatenate([empty_rows(unconditional, latents), conditioning])
    twice = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) else sigma
    without, with_prompt = model.velocity(torch.cat([latents, latents]), twice, both).chunk(2)
    return model.guided(without, with_prompt, guidance)


def refuse_seams(model: Model, config: ModelConfig) -> None:
    """Refuse pictures put together from tiles, unless told to take them: rewards look at them.

    Raises:
        UserError: they would be.
    """
    tile = model.tile()
    if tile is not None and config.tiled_decode != "accept-seams":
        raise UserError(
            f"model.tiled_decode: pictures of {model.width} x {model.height} would be put together from tiles of "
            f"{tile}, with seams that rewards see; set model.sliced_decode instead, or model.tiled_decode to "
            "accept-seams"
        )
