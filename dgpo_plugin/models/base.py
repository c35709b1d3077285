"""The face that every family shows to the rest of the library, and how a path becomes one."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from dgpo_plugin.config import ModelConfig
from dgpo_plugin.devices import numbered
from dgpo_plugin.errors import UserError
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.processor import Work, linear_work, settled
from dgpo_plugin.samplers.ode import Schedule

EMBEDDED = {"shapes": "worlds/shapes/pipeline"}
"""Pipelines shipped with the package, by name."""
FAMILIES = {
    "StableDiffusion3Pipeline": "sd3.SD3Model",
    "FluxPipeline": "flux.FluxModel",
    "Flux2Pipeline": "flux2.Flux2DevModel",
    "Flux2KleinPipeline": "flux2.Flux2KleinModel",
    "QwenImagePipeline": "qwen_image.QwenImageModel",
    "ZImagePipeline": "z_image.ZImageModel",
    "SanaPipeline": "sana.SanaModel",
    "StableDiffusionXLPipeline": "sdxl.SDXLModel",
    "StableDiffusionPipeline": "sd15.SD15Model",
}
"""Module and class of every family, by diffusers' pipeline class; imported when a model of it is loaded."""
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


def load_model(config: ModelConfig, device: torch.device | str = "cpu", *, place: bool = True) -> Model:
    """Load a base model and pick its family by the pipeline class in ``model_index.json``.

    Args:
        place: put the denoiser on the device too; a caller that encodes texts first does it afterwards.

    Raises:
        UserError: nothing there, a pipeline class that no family knows, or a precision that cannot be had.
    """
    config = settled_model(config, torch.device(device), images=16)
    folder = _locate(config.path)
    family = _family(folder, config.path)
    identity = {"path": config.path, "weights_hash": weights_hash(folder)}
    model: Model = family.load(folder, config, identity, numbered(torch.device(device)))
    if place:
        model.place()
    return model


def model_skeleton(config: ModelConfig) -> Model:
    """A model with the shapes and no weights, from its configuration files alone; make it under a fake tensor mode.

    Raises:
        UserError: as :func:`load_model`.
    """
    folder = _locate(config.path, only_configurations=True)
    skeleton: Model = _family(folder, config.path).skeleton(folder, config)
    return skeleton


def settled_model(config: ModelConfig, device: torch.device, images: int, threads: int | None = None) -> ModelConfig:
    """With the precision that ``auto`` stands for on a device, and any other found to work there.

    Args:
        images: through the denoiser at once, which is what ``auto`` is timed on.
        threads: that will compute; None for this process's.

    Raises:
        UserError: as :func:`load_model`.
    """
    work = functools.partial(denoiser_work, config, images) if config.precision == "auto" else None
    precision = settled("model.precision", config.precision, device, work, threads)
    settled("model.vae_precision", config.vae_precision, device, threads=threads)
    return config.model_copy(update={"precision": precision})


def denoiser_work(config: ModelConfig, images: int) -> Work:
    """The denoiser's linear layers as so many images use them, without its weights.

    Raises:
        UserError: as :func:`load_model`.
    """
    with torch.device("meta"), torch.no_grad():
        model = model_skeleton(config)
        latents, asked = torch.zeros(images, *model.latent_shape), model.blank_conditioning(images)
        return linear_work(model.denoiser, lambda: model.velocity(latents, 0.5, asked))


def _family(folder: Path, path: str) -> Any:
    name = _pipeline_class(folder)
    if name not in FAMILIES:
        raise UserError(
            f"model {path}: {name} is not supported; supported: {', '.join(FAMILIES)}; docs/adding-a-model.md says how"
        )
    module, kind = FAMILIES[name].split(".")
    return getattr(importlib.import_module(f"dgpo_plugin.models.{module}"), kind)


def _locate(path: str, *, only_configurations: bool = False) -> Path:
    if path in EMBEDDED:
        return Path(str(resources.files("dgpo_plugin"))) / EMBEDDED[path]
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or folder.is_absolute() or path.startswith("."):
        raise UserError(f"model {path}: no such folder; name {', '.join(EMBEDDED)}, a diffusers folder or a hub id")
    try:
        if only_configurations:
            return Path(snapshot_download(path, allow_patterns=["*.json"]))
        return Path(DiffusionPipeline.download(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {path}: not a folder, and cannot be fetched from the hub ({reason})") from error


def _pipeline_class(folder: Path) -> str:
    index = folder / "model_index.json"
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except OSError as error:
        raise UserError(f"model {folder}: has no model_index.json; it must be a diffusers pipeline folder") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{index}: not a diffusers model index; fetch the model again") from error


def weights_hash(folder: Path) -> str:
    """SHA-256 of the denoiser's weight files, so that an adapter can tell its base from another."""
    files = sorted([*folder.glob("transformer/*.safetensors"), *folder.glob("unet/*.safetensors")])
    if not files:
        raise UserError(f"model {folder}: no safetensors weights under transformer/ or unet/")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
