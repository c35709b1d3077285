"""The adapter file: one ``.safetensors`` that diffusers and ComfyUI read at the same strength.

alpha / rank is folded into lora_B in float32 and no ``.alpha`` tensor is written, because ComfyUI ignores the
header and diffusers refuses the tensor. The header carries ModelSpec and kohya fields that people's tools show,
and ours under ``dgpo.``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dgpo_plugin.common.files import atomic_path
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.policy import Policy

PACKAGES = ("dgpo-plugin", "torch", "diffusers", "peft", "transformers", "safetensors")


def folded_tensors(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors by file key, float32, scale alpha / rank folded into lora_B.

    Args:
        weights: a copy of the adapter by the names of ``policy.parameters``.
    """
    scale = policy.config.alpha / policy.config.rank
    return {
        policy.model.adapter_key(name): weight.float() * (scale if name.endswith("lora_B") else 1.0)
        for name, weight in weights.items()
    }


def export_adapter(
    policy: Policy,
    weights: Mapping[str, Tensor],
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
        weights: a copy of the adapter by the names of ``policy.parameters``.
        reward: what the card calls it; None for the configuration's name.
        reward_before, reward_after: means over the evaluation prompts; None if not measured.
        date: ISO 8601; None for now.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in folded_tensors(policy, weights).items()}
    rank = str(policy.config.rank)
    algorithm, reward = config.algorithm.name, without_folders(reward or config.reward_label)
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
