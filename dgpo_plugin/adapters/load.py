"""An adapter file in: read once, checked number by number, and put beside a model's own weights."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from torch import Tensor

from dgpo_plugin.adapters.hashes import MODELSPEC, data_sha256, stated_hashes
from dgpo_plugin.adapters.kinds import counted, is_down, is_for_text, is_matrix, kind_of
from dgpo_plugin.adapters.layers import Update, updates_for
from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, OWN_ALPHA, ScaledTensors, fold_scale
from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.first_bytes import what_instead
from dgpo_plugin.models.base_identity import base_from_text, compared_part, compared_parts

if TYPE_CHECKING:
    from dgpo_plugin.config.fields import ModelConfig
    from dgpo_plugin.models.base import Model

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of numbers that an adapter may be stored in."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""The same of what is one number, or a shape."""
PEFT_TENSORS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The two files of an adapter that peft saves: alpha is in the second alone, which most loaders do not read."""
FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_TENSORS, "adapter.safetensors")
"""The adapter in a folder of diffusers, of peft, or of a run of ours."""
ON_TOP_OF, ON_TOP_HASH = "dgpo.on_top_of", "dgpo.on_top_of_sha256"
"""What an adapter's header says of the one that its base wore: its name, and the hash of its tensors."""
NO_ADAPTER = ("whole-weight", "ControlNet or IP-Adapter", "unknown")
"""Kinds of tensors of which a file may hold any number and be no adapter."""


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
        """Read a file, or the one that a folder is for; :func:`read_adapter` also names it in errors.

        Raises:
            UserError: missing, several, not safetensors, or no adapter.
        """
        path = _in_folder(path) if os.path.isdir(path) else path  # Path.is_dir raises for a name that is too long
        try:
            instead = what_instead(path)
            if instead is not None:
                raise UserError(f"not a whole safetensors file: {instead}")
            with safetensors.safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                _refuse_no_adapter(list(file.keys()))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the handle itself is not iterable)
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{error.strerror or 'no such file'}; check the path") from error
        except safetensors.SafetensorError as error:
            raise UserError(f"not a whole safetensors file ({error}); fetch or export it again") from error
        if DIFFUSERS_HEADER not in header and _is_pefts(path, tensors):
            header.update(_header_beside(path))
        return cls(path, size, tensors, header)

    @property
    def ranks(self) -> list[int]:
        """The ranks of its layers, each once, rising."""
        down = [tensor for name, tensor in self.tensors.items() if is_down(name)]
        return sorted({tensor.shape[0] for tensor in down if tensor.ndim})

    @property
    def for_text(self) -> list[str]:
        """The keys of tensors for text encoders, which get no adapter here."""
        return [name for name in self.tensors if is_for_text(name)]

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything after the header, which headers state by ModelSpec's rule and by kohya's.

        Raises:
            UserError: the file is gone by now.
        """
        try:
            return data_sha256(self.path)
        except OSError as error:
            raise UserError(f"{error.strerror or 'no such file'}; check the path") from error

    @property
    def is_as_stated(self) -> bool | None:
        """Whether the header states the content's hash, ModelSpec's or kohya's; None if it states none."""
        stated = stated_hashes(self.header)
        return self.content_hash in stated if stated else None

    @functools.cached_property
    def usable(self) -> ScaledTensors:
        """The tensors with their scale in them, found fit to draw with.

        Raises:
            UserError: other bytes than were exported, numbers that no picture can be made with, or a scale that cannot
                be read.
        """
        for name, tensor in self.tensors.items():
            _refuse_unusable(name, tensor)
        # Other programs also state hashes by rules of their own, or keep those of a file that they changed.
        stated = self.header.get(MODELSPEC)
        if OWN_ALPHA in self.header and stated is not None and stated != f"0x{self.content_hash}":
            raise UserError("its tensors are not those that its header's hash is of; fetch or export it again")
        scaled = fold_scale(self.tensors, self.header)
        states_alpha = {DIFFUSERS_HEADER, OWN_ALPHA} & self.header.keys()
        if (
            self.path.name == PEFT_TENSORS
            and not states_alpha
            and not any(key.endswith(".alpha") for key in self.tensors)
        ):
            doubt = f"peft keeps alpha in {PEFT_SETTINGS}, which is not beside it"
            return ScaledTensors(scaled.tensors, f"unknown: {doubt}; applied as it is stored, as ComfyUI does", doubt)
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


def load_base(config: ModelConfig, device: torch.device | str = "cpu", *, place: bool = True) -> Model:
    """Load a base model, and have it wear the adapter that its configuration names, if any.

    Args:
        place: whether the denoiser goes to the device too (:func:`~dgpo_plugin.models.load.load_model`).

    Raises:
        UserError: the model cannot be loaded, or as :func:`apply_adapter`.
    """
    from dgpo_plugin.models.load import load_model  # diffusers, which reading a file does without

    if config.adapter is None:
        return load_model(config, device, place=place)
    with prefixed(f"model: adapter {config.adapter}"):
        file = AdapterFile.read(Path(config.adapter))  # before anything large is loaded
        _refuse_doubt(file, config.adapter_strength, "model.adapter_strength")
    model = load_model(config, device, place=place)
    with prefixed(f"model: adapter {config.adapter}"):
        _wear(model, file, _matched(model, file, any_base=False), config.adapter_strength)
    return model


def apply_adapter(model: Model, path: Path, *, strength: float | None = None, any_base: bool = False) -> AdapterFile:
    """Attach an adapter to a model's denoiser, strictly: its layers give W x + strength B A x from here on.

    Args:
        path: of a file, or of a folder that diffusers or peft saved.
        strength: 1 is the adapter as it was trained, 0 the base; None is 1, where the file's scale is known.
        any_base: accept an adapter that says it was trained on another denoiser; one that does not say is accepted.

    Returns:
        The file; what it has for text encoders was left out.

    Raises:
        UserError: as :func:`read_adapter`; a strength or numbers that no picture can be made with; another base; a
            scale that cannot be told, and no strength given; tensors that are no LoRA; or any that matches no weight.
    """
    with prefixed(f"adapter {path}"):
        if strength is not None and not math.isfinite(strength):
            raise UserError(f"strength {strength} draws no picture; give a number, 1 for as it was trained")
        file = AdapterFile.read(path)
        updates = _matched(model, file, any_base=any_base)
        _refuse_doubt(file, strength, "the strength (--strength)")
        _wear(model, file, updates, strength)
    return file


def _refuse_doubt(file: AdapterFile, strength: float | None, where: str) -> None:
    """Refuse a scale that cannot be told, unless a strength is given, which ``where`` names."""
    if strength is None and (doubt := file.usable.doubt):
        raise UserError(f"the scale is unknown: {doubt}; give it as {where}, 1 for as it is stored")


def _wear(model: Model, file: AdapterFile, updates: Sequence[Update], strength: float | None) -> None:
    """Attach an adapter's updates for good, and have the model say so."""
    for update in updates:
        update.attach(1.0 if strength is None else strength)
    model.worn = (*model.worn, file.content_hash)


def match_adapter(model: Model, path: Path) -> tuple[AdapterFile, list[Update]]:
    """Find the layers of a model that an adapter is for, strictly, and attach nothing.

    Returns:
        The file, and what :func:`~dgpo_plugin.adapters.layers.attached` takes; where the file's scale is unknown
        (``usable.doubt``), strength 1 is as it is stored.

    Raises:
        UserError: as :func:`apply_adapter`, but for the scale.
    """
    with prefixed(f"adapter {path}"):
        file = AdapterFile.read(path)
        return file, _matched(model, file, any_base=False)


def _matched(model: Model, file: AdapterFile, *, any_base: bool) -> list[Update]:
    usable = file.usable
    if not any_base:
        _refuse_another_base(file, model)
    return updates_for(model, usable.tensors)


def _in_folder(folder: Path) -> Path:
    """The adapter that a folder holds: the one of the name that its writer gives it, or the only one.

    Raises:
        UserError: none, or several.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    known = [name for name in FOLDER_FILES if name in files]
    chosen = known or files
    if len(chosen) > 1:
        raise UserError(f"is a folder with {len(chosen)} adapters ({', '.join(chosen[:5])}); name one of them")
    if not chosen:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        also = f" ({pickles[0]} is a pickle, which can run code and is never loaded)" if pickles else ""
        raise UserError(f"is a folder without a .safetensors file{also}; name the adapter's file")
    return folder / chosen[0]


def _refuse_no_adapter(names: list[str]) -> None:
    """Refuse a file of which no tensor is of an adapter, before its tensors are read: it may be a whole model."""
    if all(kind_of(name) in NO_ADAPTER or name == "emb_params" for name in names):
        what = f"{len(names)} tensors are {counted(names)}" if names else "header names none"
        raise UserError(f"holds no adapter: its {what}; name an adapter's file")


def _is_pefts(path: Path, names: Iterable[str]) -> bool:
    """Whether a file is one that peft saved: by its name, or by its tensors' where it is the only one in its folder."""
    if path.name == PEFT_TENSORS:
        return True
    return (
        all(name.startswith("base_model.model.") for name in names) and len([*path.parent.glob("*.safetensors")]) == 1
    )


def _header_beside(path: Path) -> dict[str, str]:
    """What peft's settings beside its tensors say, as diffusers writes it into a header; nothing if there are none.

    Raises:
        UserError: they cannot be read.
    """
    beside = path.with_name(PEFT_SETTINGS)
    if not beside.is_file():
        return {}
    try:
        text = read_text(beside)
        if not isinstance(json.loads(text), dict):
            raise ValueError("no object")
        return {DIFFUSERS_HEADER: text}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{beside}: cannot be read; the adapter's alpha is in it, so fetch both again") from error


def _refuse_unusable(name: str, tensor: Tensor) -> None:
    counts = WHOLE if name.endswith((".reshape_weight", ".alpha")) else ()
    if tensor.dtype not in (*STORED, *counts):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds {kind}; convert the file to float32, float16 or bfloat16")
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds NaN or infinite numbers; export it again, or from an earlier checkpoint")
    if name.endswith(".alpha"):
        if tensor.numel() != 1:
            raise UserError(f"{name} must be one number, and is {tuple(tensor.shape)}")
    elif is_matrix(name) and (tensor.ndim < 2 or not tensor.numel()):
        raise UserError(f"{name} is {tuple(tensor.shape)}, and a LoRA's matrices have a rank of at least 1")


def _refuse_another_base(file: AdapterFile, model: Model) -> None:
    below = file.header.get(ON_TOP_HASH, "")
    if below and below not in model.worn:
        raise UserError(
            f"was trained on top of {file.header.get(ON_TOP_OF, 'an adapter that it does not name')}, which the model "
            "does not wear; name that as model.adapter or before this one, or pass --any-base to try it all the same"
        )
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
