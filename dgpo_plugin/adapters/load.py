"""An adapter file in: read once, checked number by number, and put beside a model's own weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from dgpo_plugin.adapters.save import content_hash
from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, LORA_SUFFIXES, OWN_ALPHA, ScaledTensors, fold_scale
from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.base_identity import base_from_text, compared_part, compared_parts
from dgpo_plugin.models.policy import attach

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of numbers that an adapter may be stored in."""
PEFT_TENSORS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The two files of an adapter that peft saves: alpha is in the second alone, which most loaders do not read."""
DOWN_SUFFIXES = tuple(down for down, _ in LORA_SUFFIXES)
MATRIX_SUFFIXES = tuple(suffix for pair in LORA_SUFFIXES for suffix in pair)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter's file as it is on disk, read once, and what can be told from it alone.

    Attributes:
        path: where it was read from.
        size: of the file, in bytes.
        tensors: as they are stored, by key.
        header: the file's metadata; of peft's, which has none, what the file beside it says of alpha.
    """

    path: Path
    size: int
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read a file; :func:`read_adapter` also names it in errors.

        Raises:
            UserError: missing, not safetensors, or not a LoRA.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the handle itself is not iterable)
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{error.strerror or 'no such file'}; check the path") from error
        except safetensors.SafetensorError as error:
            raise UserError(f"not a whole safetensors file ({error}); fetch or export it again") from error
        if not any(name.endswith(DOWN_SUFFIXES) for name in tensors):
            raise UserError("holds no LoRA tensors; name an adapter made by `dgpo train`")
        if path.name == PEFT_TENSORS and DIFFUSERS_HEADER not in header:
            header.update(_header_beside(path))
        return cls(path, size, tensors, header)

    @property
    def ranks(self) -> list[int]:
        """The ranks of its layers, each once, rising."""
        down = [tensor for name, tensor in self.tensors.items() if name.endswith(DOWN_SUFFIXES)]
        return sorted({tensor.shape[0] for tensor in down if tensor.ndim})

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of the tensors as they are stored; files of ours state it in ``modelspec.hash_sha256``."""
        return content_hash(self.tensors)

    @functools.cached_property
    def usable(self) -> ScaledTensors:
        """The tensors with their scale in them, found fit to draw with.

        Raises:
            UserError: other bytes than were exported, numbers that no picture can be made with, or a scale that cannot
                be read.
        """
        for name, tensor in self.tensors.items():
            _refuse_unusable(name, tensor)
        stated = self.header.get("modelspec.hash_sha256")
        # Others' hashes are made of other bytes.
        if OWN_ALPHA in self.header and stated is not None and stated != self.content_hash:
            raise UserError("its tensors are not those that its header's hash is of; fetch or export it again")
        scaled = fold_scale(self.tensors, self.header)
        for name, tensor in scaled.tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} times its scale is not finite (alpha?); export it again")
        return scaled


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter file: its tensors, its header and its scale.

    Raises:
        UserError: missing, not safetensors, or not a LoRA.
    """
    with prefixed(f"adapter {path}"):
        return AdapterFile.read(path)


def apply_adapter(model: Model, path: Path, *, strength: float = 1.0, any_base: bool = False) -> AdapterFile:
    """Attach an adapter to a model's denoiser, strictly: its layers give W x + strength B A x from here on.

    Args:
        strength: 1 is the adapter as it was trained, 0 the base.
        any_base: accept an adapter that says it was trained on another denoiser; one that does not say is accepted.

    Returns:
        The file.

    Raises:
        UserError: as :func:`read_adapter`; numbers that no picture can be made with; another base; or any tensor that
            matches no weight.
    """
    with prefixed(f"adapter {path}"):
        file = AdapterFile.read(path)
        tensors = file.usable.tensors
        if not any_base:
            _refuse_another_base(file, model)
        for layer, down, up in _matched(model, tensors):
            attach(layer, down, up, strength)
    return file


def _header_beside(path: Path) -> dict[str, str]:
    """What peft's settings beside its tensors say, as diffusers writes it into a header; nothing if there are none."""
    beside = path.with_name(PEFT_SETTINGS)
    if not beside.is_file():
        return {}
    try:
        return {DIFFUSERS_HEADER: beside.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise UserError(f"{beside}: cannot be read; the adapter's alpha is in it, so fetch both again") from error


def _refuse_unusable(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in STORED:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds {kind}; convert the file to float32, float16 or bfloat16")
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds NaN or infinite numbers; export it again, or from an earlier checkpoint")
    if name.endswith(".alpha"):
        if tensor.numel() != 1:
            raise UserError(f"{name} must be one number, and is {tuple(tensor.shape)}")
    elif name.endswith(MATRIX_SUFFIXES) and (tensor.ndim < 2 or not tensor.numel()):
        raise UserError(f"{name} is {tuple(tensor.shape)}, and a LoRA's matrices have a rank of at least 1")


def _refuse_another_base(file: AdapterFile, model: Model) -> None:
    then = base_from_text(file.header.get("dgpo.base_parts", ""))
    if model.prefix not in then:
        return
    found = compared_part(then[model.prefix], model.identity.get(model.prefix))
    if found.verdict == "differs":
        trained_on = file.header.get("dgpo.base_model", "a model that it does not name")
        detail = f" ({found.detail})" if found.detail else ""
        raise UserError(
            f"was trained on {trained_on} with another {model.prefix} than {model.path}'s{detail}; "
            f"name that model, or pass --any-base to try it all the same"
        )


def base_notes(file: AdapterFile, model: Model) -> list[str]:
    """Lines on how far a model is the base that an adapter was trained on; none if it is, in every part.

    Raises:
        UserError: a file of the model's weights cannot be read.
    """
    trained_on = file.header.get("dgpo.base_model", file.header.get("ss_base_model_version"))
    then = base_from_text(file.header.get("dgpo.base_parts", ""))
    if not then:
        named = f"was trained on {trained_on}" if trained_on else "does not say what it was trained on"
        return [f"{file.path.name} {named}; whether {model.path} has the same weights cannot be told"]
    told = {
        "differs": "is not the one",
        "the same but rounded": "is the same but rounded: not stored in the type of the one",
        "cannot be told": "cannot be compared with the one",
    }
    return [
        f"{model.path}: its {name} {told[found.verdict]} that {file.path.name} was trained with"
        f"{f' ({found.detail})' if found.detail else ''}"
        for name, found in compared_parts(then, model.identity).items()
        if found.verdict != "the same"
    ]


def _matched(model: Model, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Linear, Tensor, Tensor]]:
    """Each adapted layer of a model with its two matrices, (rank, inputs) and (outputs, rank), float32.

    Raises:
        UserError: a tensor that matches no weight.
    """
    updates: list[tuple[nn.Linear, Tensor, Tensor]] = []
    used: set[str] = set()
    for name, layer in model.denoiser.named_modules():
        keys = [model.adapter_key(f"{name}.{matrix}") for matrix in ("lora_A", "lora_B")]
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
            f"{len(unmatched)} of {len(tensors)} tensors match no weight of {model.path} "
            f"(first: {unmatched[0]}); it was made for another model or format"
        )
    return updates
