"""How a path becomes a model: found on the disk or the hub, its family picked, its weights loaded."""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.names import FAMILIES, WORLDS
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.distributed.device import numbered
from dgpo_plugin.distributed.processor import Work, linear_work, settled
from dgpo_plugin.models.base import Model


def load_model(config: ModelConfig, device: torch.device | str = "cpu", *, place: bool = True) -> Model:
    """Load a base model and pick its family by the pipeline class in ``model_index.json``.

    Args:
        place: put the denoiser on the device too; a caller that encodes texts first does it afterwards.

    Raises:
        UserError: nothing there, a pipeline class that no family knows, or a precision that cannot be had.
    """
    config = settled_model(config, torch.device(device), images=16)
    config, folder = _sized(config), locate(config.path)
    family = _family(folder, config.path)
    _refuse_without_weights(folder)
    model: Model = family.load(folder, config, numbered(torch.device(device)))
    if place:
        model.place()
    return model


def model_skeleton(config: ModelConfig) -> Model:
    """The shapes of a model without its weights, from its configuration files; make it under a fake tensor mode.

    Raises:
        UserError: as :func:`load_model`.
    """
    config, folder = _sized(config), locate(config.path, only_configurations=True)
    skeleton: Model = _family(folder, config.path).skeleton(folder, config)
    return skeleton


def settled_model(config: ModelConfig, device: torch.device, images: int, threads: int | None = None) -> ModelConfig:
    """A model's configuration with the precision that ``auto`` stands for on a device; another is seen to work there.

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
        latents, conditioning = torch.zeros(images, *model.latent_shape), model.blank_conditioning(images)
        return linear_work(model.denoiser, lambda: model.velocity(latents, 0.5, conditioning))


def _sized(config: ModelConfig) -> ModelConfig:
    """A configuration with the sides of a world's own pictures, where it asks for no others."""
    path = config.path
    size = WORLDS.load(path).size if path in WORLDS or is_from_file(path) else None
    if size is None or config.width is not None:  # neither side or both are asked for
        return config
    return config.model_copy(update={"width": size[0], "height": size[1]})


def _family(folder: Path, path: str) -> Any:
    name = _pipeline_class(folder)
    # Of registered names alone: a model's own file must not name code to run.
    if name not in FAMILIES:
        raise UserError(
            f"model {path}: {name} is not supported; supported: {', '.join(FAMILIES)}; "
            f"docs/adding-a-model.md says how to add one"
        )
    with prefixed(f"model {path}"):
        return FAMILIES.load(name)


def world_pipeline(name: str) -> Path:
    """The folder of a world's pipeline.

    Raises:
        UserError: none is shipped with it.
    """
    package, _, folder = WORLDS.load(name).pipeline.partition(":")
    found = Path(str(resources.files(package))) / folder if folder else Path(package)
    if not found.is_dir():
        raise UserError(
            f"model {name}: no pipeline of this world is shipped; make one with `dgpo worlds pretrain {name} --output "
            f"FOLDER`, and name that folder"
        )
    return found


def locate(path: str, *, only_configurations: bool = False) -> Path:
    """The folder of a pipeline: a world's, one on the disk, or the hub's, fetched.

    Args:
        only_configurations: without the weights.

    Raises:
        UserError: none of them.
    """
    if path in WORLDS or is_from_file(path):
        return world_pipeline(path)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or folder.is_absolute() or path.startswith("."):
        raise UserError(f"model {path}: no such folder; name {', '.join(WORLDS)}, a diffusers folder or a hub id")
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
        return str(json.loads(read_text(index))["_class_name"])
    except OSError as error:
        raise UserError(f"model {folder}: has no model_index.json; it must be a diffusers pipeline folder") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a diffusers model index; fetch the model again") from error


def _refuse_without_weights(folder: Path) -> None:
    """Refuse a denoiser that is not in safetensors files, before anything else is read."""
    if not any(any(folder.glob(f"{part}/*.safetensors")) for part in ("transformer", "unet")):
        raise UserError(f"model {folder}: no safetensors weights under transformer/ or unet/")
