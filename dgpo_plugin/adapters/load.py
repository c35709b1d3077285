"""An adapter file in: read strictly, checked, and put beside a model's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from dgpo_plugin.adapters.save import _tensors_hash
from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, HALVES, OWN_ALPHA, folded
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.policy import attach

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


PEFT_TENSORS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The two files of an adapter that peft saves: alpha is in the second alone, which most loaders do not read."""


DOWN = tuple(first for first, _ in HALVES)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of an adapter file; of peft's, which has none, what the file beside it says of alpha.

    Raises:
        UserError: missing, not safetensors, or not a LoRA.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the handle itself is not iterable)
    except OSError as error:
        raise UserError(f"adapter {path}: {error.strerror or 'no such file'}; check the path") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"adapter {path}: not a whole safetensors file ({error}); fetch or export it again") from error
    if not any(name.endswith(DOWN) for name in tensors):
        raise UserError(f"adapter {path}: holds no LoRA tensors; name an adapter made by `dgpo train`")
    beside = path.with_name(PEFT_SETTINGS)
    if path.name == PEFT_TENSORS and DIFFUSERS_HEADER not in header and beside.is_file():
        try:
            header[DIFFUSERS_HEADER] = beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{beside}: cannot be read; the adapter's alpha is in it, so fetch both again") from error
    return tensors, header


def usable_adapter(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """An adapter file's tensors with their scale in them, its header, and a line on the scale.

    Args:
        where: opens the message of an error, as ``adapter PATH``.

    Raises:
        UserError: as :func:`read_adapter`, or numbers that no picture can be made with.
    """
    tensors, header = read_adapter(path)
    scaled, scale = _usable(tensors, header, where)
    return scaled, header, scale


def _usable(tensors: Mapping[str, Tensor], header: Mapping[str, str], where: str) -> tuple[dict[str, Tensor], str]:
    for name, tensor in tensors.items():
        _refuse_unusable(name, tensor, where)
    written = header.get("modelspec.hash_sha256")
    # Others' hashes are made of other bytes.
    if OWN_ALPHA in header and written is not None and written != _tensors_hash(tensors):
        raise UserError(f"{where}: its tensors are not those that its header's hash is of; fetch or export it again")
    scaled, scale = folded(tensors, header, where)
    for name, tensor in scaled.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} times its scale is not finite (alpha?); export it again")
    return scaled, scale


def _refuse_unusable(name: str, tensor: Tensor, where: str) -> None:
    if tensor.dtype not in STORED:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{where}: {name} holds {kind}; convert the file to float32, float16 or bfloat16")
    if not tensor.isfinite().all():
        raise UserError(
            f"{where}: {name} holds NaN or infinite numbers; export it again, or from an earlier checkpoint"
        )
    if name.endswith(".alpha"):
        if tensor.numel() != 1:
            raise UserError(f"{where}: {name} must be one number, and is {tuple(tensor.shape)}")
    elif name.endswith(tuple(end for pair in HALVES for end in pair)) and (tensor.ndim < 2 or not tensor.numel()):
        raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, and a LoRA's halves have a rank of at least 1")


def apply_adapter(model: Model, path: Path, *, strength: float = 1.0, any_base: bool = False) -> dict[str, str]:
    """Attach an adapter to a model's denoiser, strictly: its layers give W x + strength B A x from here on.

    Args:
        any_base: accept an adapter whose base weights are not the model's.

    Returns:
        The header.

    Raises:
        UserError: as :func:`usable_adapter`; another base, or any tensor that matches no weight.
    """
    tensors, header, _ = usable_adapter(path, f"adapter {path}")
    expected = header.get("dgpo.base_weights_hash")
    if expected != model.identity["weights_hash"] and not any_base:
        trained_on = header.get("dgpo.base_model", "an unnamed model")
        raise UserError(
            f"adapter {path}: was trained on {trained_on} with other weights than {model.identity['path']}'s; "
            f"name that model, or pass --any-base to try it all the same"
        )
    updates: list[tuple[nn.Linear, Tensor, Tensor]] = []
    used: set[str] = set()
    for name, layer in model.denoiser.named_modules():
        keys = [model.adapter_key(f"{name}.{half}") for half in ("lora_A", "lora_B")]
        if not isinstance(layer, nn.Linear) or not all(key in tensors for key in keys):
            continue
        down, up = (tensors[key].float() for key in keys)
        # Not by its weights: quantized ones are packed.
        if (layer.out_features, layer.in_features) == (up.shape[0], down.shape[1]) and len(down) == up.shape[1]:
            updates.append((layer, down, up))
            used |= set(keys)
    unmatched = sorted(set(tensors) - used)
    if unmatched:
        raise UserError(
            f"adapter {path}: {len(unmatched)} of {len(tensors)} tensors match no weight of {model.identity['path']} "
            f"(first: {unmatched[0]}); it was made for another model or format"
        )
    for layer, down, up in updates:
        attach(layer, down, up, strength)
    return header
