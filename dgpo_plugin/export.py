"""The adapter file: one ``.safetensors`` that diffusers and ComfyUI read at the same strength.

alpha / rank is folded into lora_B in float32 and no ``.alpha`` tensor is written, because ComfyUI ignores the
header and diffusers refuses the tensor. The header carries ModelSpec and kohya fields that people's tools show,
and ours under ``dgpo.``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from dgpo_plugin.config import RunConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.files import atomic_path
from dgpo_plugin.lora import Policy, attach
from dgpo_plugin.models.base import Model
from dgpo_plugin.strength import DIFFUSERS_HEADER, HALVES, OWN_ALPHA, folded

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PEFT_TENSORS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The two files of an adapter that peft saves: alpha is in the second alone, which most loaders do not read."""
DOWN = tuple(first for first, _ in HALVES)
STEPS = ("dgpo.optimizer_steps", "dgpo.replanned")
PACKAGES = ("dgpo-plugin", "torch", "diffusers", "peft", "transformers", "safetensors")


def folded_tensors(policy: Policy, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors by file key, float32, scale alpha / rank folded into lora_B.

    Args:
        weights: a copy of the adapter in the order of ``policy.names``.
    """
    scale = policy.config.alpha / policy.config.rank
    return {
        policy.model.adapter_key(name): weight.float() * (scale if name.endswith("lora_B") else 1.0)
        for name, weight in zip(policy.names, weights, strict=True)
    }


def export_adapter(
    policy: Policy,
    weights: Sequence[Tensor],
    path: Path,
    config: RunConfig,
    *,
    reward: str | None = None,
    steps: int,
    reward_before: float | None,
    reward_after: float | None,
    date: str | None = None,
) -> None:
    """Write an adapter with its card.

    Args:
        weights: a copy of the adapter in the order of ``policy.names``.
        reward: what the card calls it; None for the configuration's name.
        reward_before, reward_after: means over the evaluation prompts; None if not measured.
        date: ISO 8601; None for now.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in folded_tensors(policy, weights).items()}
    rank = str(policy.config.rank)
    algorithm, reward = config.algorithm.name, without_folders(reward or config.reward.label)
    title = path.parent.name if path.stem == "adapter" else path.stem
    comment = f"{algorithm} on reward {reward}, {steps} optimizer steps"
    dumped = json.dumps(without_folders(config.model_dump(mode="json")))
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{policy.model.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": comment,
        "modelspec.date": date or creation_date(),
        "modelspec.resolution": f"{policy.model.resolution}x{policy.model.resolution}",
        "modelspec.hash_sha256": _tensors_hash(tensors),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        # Folded: whoever divides alpha by dim gets 1.
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_base_model_version": policy.model.architecture,
        "ss_training_comment": comment,
        "dgpo.base_model": without_folders(policy.model.identity["path"]),
        "dgpo.base_weights_hash": policy.model.identity["weights_hash"],
        "dgpo.algorithm": algorithm,
        "dgpo.reward": reward,
        "dgpo.optimizer_steps": str(steps),
        "dgpo.original_alpha": f"{policy.config.alpha:g}",
        "dgpo.config": dumped,
        "dgpo.config_hash": hashlib.sha256(dumped.encode()).hexdigest(),
        "dgpo.packages": json.dumps(package_versions()),
    }
    if config.training.replanned:
        moves = (f"after iteration {done} its end was moved from {end}" for done, end in config.training.replanned)
        header["dgpo.replanned"] = f"{', '.join(moves)}; now {config.training.iterations}"
    if config.lora.license:
        header["modelspec.license"] = config.lora.license
    if reward_before is not None:
        header["dgpo.reward_before"] = f"{reward_before:.6f}"
    if reward_after is not None:
        header["dgpo.reward_after"] = f"{reward_after:.6f}"
    with atomic_path(path) as temporary:
        temporary.write_bytes(_in_order(save(tensors, metadata=header)))


def without_folders(value: Any) -> Any:
    """A configuration's values with every absolute path cut to its last part: adapters are passed on to strangers."""
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in value.split(" "))


def _in_order(blob: bytes) -> bytes:
    """A safetensors file with its header sorted: the writer's order of metadata changes from call to call."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]


def creation_date() -> str:
    """Now in UTC, ISO 8601; ``SOURCE_DATE_EPOCH`` if it is set, so that the same run gives the same file."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(given), timezone.utc) if given else datetime.now(timezone.utc)
    return now.isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide an adapter's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that was never installed
            continue
    return found


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16 and no eight-bit floats.
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def as_table(rows: Sequence[tuple[str, str]]) -> str:
    """(label, value) rows as lines of text, the values under each other; a value's control characters are written out.

    What a stranger's header says must neither forge a row nor speak to the terminal.
    """
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {_printable(value)}" for label, value in rows)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def describe_adapter(path: Path) -> list[tuple[str, str]]:
    """The card that ``dgpo inspect`` prints: (label, value) rows."""
    tensors, header = read_adapter(path)
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith(DOWN) and tensor.ndim})
    return [
        ("file", f"{path} ({path.stat().st_size / 1024:.0f} KiB)"),
        ("title", header.get("modelspec.title", "-")),
        ("base model", header.get("dgpo.base_model", header.get("ss_base_model_version", "-"))),
        ("base weights", header.get("dgpo.base_weights_hash", "-")),
        ("architecture", header.get("modelspec.architecture", "-")),
        ("algorithm", header.get("dgpo.algorithm", "-")),
        ("reward", header.get("dgpo.reward", "-")),
        ("reward before", header.get("dgpo.reward_before", "-")),
        ("reward after", header.get("dgpo.reward_after", "-")),
        ("optimizer steps", "; ".join(header[key] for key in STEPS if key in header) or "-"),
        ("rank", ", ".join(map(str, ranks))),
        ("scale", _scale_note(tensors, header)),
        ("tensors", f"{len(tensors)}, {sum(t.numel() for t in tensors.values()):,} parameters"),
        ("date", header.get("modelspec.date", "-")),
        ("licence", header.get("modelspec.license", "not stated in the file")),
        ("config hash", header.get("dgpo.config_hash", "-")),
        ("content hash", _hash_note(tensors, header)),
        ("packages", _packages_note(header.get("dgpo.packages", "{}"))),
    ]


def _scale_note(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    try:
        return _usable(tensors, header, "")[1]
    except UserError as error:
        return f"cannot be applied{error}"


def _packages_note(text: str) -> str:
    try:
        return ", ".join(f"{name} {number}" for name, number in json.loads(text).items()) or "-"
    except (ValueError, AttributeError, RecursionError):
        return "cannot be read"


def _hash_note(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    written = header.get("modelspec.hash_sha256")
    if written is None:
        return "-"
    return f"{written} ({'matches' if written == _tensors_hash(tensors) else 'DOES NOT MATCH the tensors'})"
