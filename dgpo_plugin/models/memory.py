"""What makes a model smaller, or keeps it out of the way, whatever its family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.base import dtype_of
from dgpo_plugin.models.parts import Part, load_part
from dgpo_plugin.models.speed import blocks


@contextlib.contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device for the block, and back where they were after it; nothing moves that is there."""
    origins = [device_of(module) for module in modules]
    moved = [(module, origin) for module, origin in zip(modules, origins, strict=True) if origin != device]
    try:
        for module, _ in moved:
            module.to(device)
        yield
    finally:
        for module, origin in moved:
            module.to(origin)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's weights are on."""
    return next(module.parameters()).device


def can_offload_denoiser(config: ModelConfig) -> bool:
    """Whether the denoiser can make room for a while: not if it is sharded, nor with 8 bits of bitsandbytes.

    Those could not be moved before its version 0.48.
    """
    return not config.shard and config.quantization != "bitsandbytes-int8"


def shard(denoiser: nn.Module, kept_whole: Sequence[nn.Parameter], device: torch.device) -> None:
    """Split a frozen denoiser's weights over all processes, block by block (FSDP2); the adapter stays whole on each.

    Args:
        denoiser: on the CPU, so that no device ever holds all of it.
        kept_whole: parameters to leave as they are; they are moved to the device.
    """
    # Some builds of torch for Windows and macOS have no distributed part.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        # Of one process nobody has made a group: accelerate does it for several.
        backend = torch.distributed.get_default_backend_for_device(device)
        alone = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored = set(kept_whole)
    for block in blocks(denoiser, "_no_split_modules"):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(denoiser, mesh=mesh, ignored_params=ignored)
    for parameter in kept_whole:
        parameter.data = parameter.data.to(device)
    for module in denoiser.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load_quantized(module_class: Any, folder: Path, config: ModelConfig, device: torch.device) -> Part:
    """A denoiser with its linear layers in 8 or 4 bits, through diffusers.

    Args:
        module_class: the denoiser's, of diffusers.
        folder: of its weights.

    Raises:
        UserError: the backend is not installed, or cannot do it on this device; or as :func:`~.parts.load_part`.
    """
    dtype = dtype_of(config)
    try:
        return load_part(
            module_class,
            folder,
            dtype,
            quantization_config=_quantization(config, dtype),
            device_map={"": device},
        )
    except (ImportError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.quantization {config.quantization}: {reason}; install it or set it to null") from error


def _quantization(config: ModelConfig, dtype: torch.dtype) -> Any:
    if config.quantization == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    if config.quantization == "bitsandbytes-int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
