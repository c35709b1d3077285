"""An adapter file out: one ``.safetensors`` that diffusers and ComfyUI read at the same strength.

alpha / rank is folded into lora_B in float32 and no ``.alpha`` tensor is written, because ComfyUI ignores the
header and diffusers refuses the tensor. The header carries ModelSpec and kohya fields that people's tools show,
and ours under ``dgpo.``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dgpo_plugin.common.files import atomic_path
from dgpo_plugin.common.provenance import creation_date, package_versions
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.base_identity import base_as_text
from dgpo_plugin.models.policy import Policy


@dataclass(frozen=True)
class TrainingFacts:
    """What a run tells of itself for its adapter's card.

    Attributes:
        config: the run's.
        optimizer_steps: that were done.
        reward: what the card calls it; None for the configuration's name.
        reward_before, reward_after: means over the evaluation prompts; None if not measured.
        date: ISO 8601.
    """

    config: RunConfig
    optimizer_steps: int
    reward: str | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    date: str = field(default_factory=creation_date)

    @property
    def reward_name(self) -> str:
        """What the card calls the reward, free of folders."""
        return str(without_folders(self.config.reward_label if self.reward is None else self.reward))


def export_adapter(policy: Policy, weights: Mapping[str, Tensor], path: Path, facts: TrainingFacts) -> None:
    """Write an adapter with its card.

    Args:
        weights: a copy of the adapter by the names of ``policy.parameters``.
        path: of the file; its title in people's tools is its name, or its folder's if it is called ``adapter``.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in folded_tensors(policy, weights).items()}
    title = path.parent.name if path.stem == "adapter" else path.stem
    header = {
        **_modelspec_header(policy, title, facts),
        **_own_header(policy, facts),
        "modelspec.hash_sha256": content_hash(tensors),
    }
    with atomic_path(path) as temporary:
        temporary.write_bytes(_in_order(save(tensors, metadata=header)))


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


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' keys and bytes, in the order of the keys: what ``modelspec.hash_sha256`` states."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16 and no eight-bit floats.
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def without_folders(value: Any) -> Any:
    """A configuration's values with every absolute path cut to its last part: adapters are passed on to strangers."""
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in value.split(" "))


def _modelspec_header(policy: Policy, title: str, facts: TrainingFacts) -> dict[str, str]:
    """ModelSpec's and kohya's fields, which people's tools show."""
    model, rank = policy.model, str(policy.config.rank)
    comment = f"{facts.config.algorithm.name} on reward {facts.reward_name}, {facts.optimizer_steps} optimizer steps"
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": comment,
        "modelspec.date": facts.date,
        "modelspec.resolution": f"{model.resolution}x{model.resolution}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        # Folded: whoever divides alpha by dim gets 1.
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_base_model_version": model.architecture,
        "ss_training_comment": comment,
    }
    if facts.config.lora.license:
        header["modelspec.license"] = facts.config.lora.license
    return header


def _own_header(policy: Policy, facts: TrainingFacts) -> dict[str, str]:
    """Our own fields, under ``dgpo.``: on which base and reward the adapter was trained, how long, and with what."""
    config, model = facts.config, policy.model
    dumped = json.dumps(without_folders(config.model_dump(mode="json")))
    header = {
        "dgpo.base_model": without_folders(model.path),
        "dgpo.base_parts": base_as_text(model.identity, model.prefix),
        "dgpo.algorithm": config.algorithm.name,
        "dgpo.reward": facts.reward_name,
        "dgpo.optimizer_steps": str(facts.optimizer_steps),
        "dgpo.original_alpha": f"{policy.config.alpha:g}",
        "dgpo.config": dumped,
        "dgpo.config_hash": hashlib.sha256(dumped.encode()).hexdigest(),
        "dgpo.packages": json.dumps(package_versions()),
    }
    if config.training.replanned:
        moves = (f"after iteration {done} its end was moved from {end}" for done, end in config.training.replanned)
        header["dgpo.replanned"] = f"{', '.join(moves)}; now {config.training.iterations}"
    if facts.reward_before is not None:
        header["dgpo.reward_before"] = f"{facts.reward_before:.6f}"
    if facts.reward_after is not None:
        header["dgpo.reward_after"] = f"{facts.reward_after:.6f}"
    return header


def _in_order(blob: bytes) -> bytes:
    """A safetensors file with its header sorted: the writer's order of metadata changes from call to call."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]
