"""An adapter file out: one ``.safetensors`` that diffusers and ComfyUI read at the same strength.

alpha / rank is folded into lora_B in float32 and no ``.alpha`` tensor is written, because ComfyUI ignores the
header and diffusers refuses the tensor. The header carries ModelSpec and kohya fields that people's tools show,
and ours under ``dgpo.``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from dgpo_plugin.adapters.hashes import head_of, header_hashes
from dgpo_plugin.adapters.load import ON_TOP_HASH, ON_TOP_OF
from dgpo_plugin.common.files import atomic_path
from dgpo_plugin.common.provenance import creation_date, package_versions
from dgpo_plugin.common.public_names import public_name, without_folders
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.base_identity import base_as_text

if TYPE_CHECKING:
    from dgpo_plugin.models.policy import Policy


@dataclass(frozen=True)
class TrainingFacts:
    """What a run tells of itself for its adapter's card.

    Attributes:
        config: the run's.
        optimizer_steps: that were done.
        reward: what the card calls it; None for the configuration's name.
        reward_before, reward_after: means over the evaluation prompts; None if not measured.
        measured_on: what the evaluation prompts are, as in ``held-out prompts``; empty if that is not known.
        reward_before_note, reward_after_note: over how many pictures, where some could not be scored; else empty.
        accepted: what was changed knowingly while it went on, a text for each, free of folders.
        guard: what the alarm for reward hacking said; empty for nothing.
        date: ISO 8601.
    """

    config: RunConfig
    optimizer_steps: int
    reward: str | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    measured_on: str = ""
    reward_before_note: str = ""
    reward_after_note: str = ""
    accepted: Sequence[str] = ()
    guard: str = ""
    date: str = field(default_factory=creation_date)

    @property
    def reward_name(self) -> str:
        """What the card calls the reward, free of folders."""
        return self.free_of_folders(self.config.reward_label if not self.reward else self.reward)

    def free_of_folders(self, text: str) -> str:
        """A text in which rewards' names may stand, as strangers may see it."""
        # With the configuration, whose paths may stand in it: one with spaces cannot be told from words.
        return str(without_folders([text, self.config.model_dump(mode="json")])[0])


def export_adapter(policy: Policy, weights: Mapping[str, Tensor], path: Path, facts: TrainingFacts) -> None:
    """Write an adapter with its card.

    Args:
        weights: a copy of the adapter by the names of ``policy.parameters``.
        path: of the file; its title in people's tools is its name, or its folder's if it is called ``adapter``.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in folded_tensors(policy, weights).items()}
    title = path.parent.name or path.stem if path.stem == "adapter" else path.stem
    header = {**_modelspec_header(policy, title, facts), **_own_header(policy, facts)}
    if changes_nothing(weights):
        header["modelspec.description"] += "; all zeros, it changes nothing"
    blob = save(tensors)
    size = int.from_bytes(blob[:8], "little")
    entries, data = json.loads(blob[8 : 8 + size]), memoryview(blob)[8 + size :]
    header |= header_hashes(entries, data, header)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        # Sorted: safetensors' own order of metadata changes from call to call.
        stream.write(head_of(entries, dict(sorted(header.items()))))
        stream.write(data)


def changes_nothing(weights: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is as it was before training: lora_B of every layer is zero.

    Args:
        weights: a copy of the adapter by the names of a policy's parameters.
    """
    return not any(bool(weight.any()) for name, weight in weights.items() if name.endswith("lora_B"))


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


def _modelspec_header(policy: Policy, title: str, facts: TrainingFacts) -> dict[str, str]:
    """ModelSpec's and kohya's fields, which people's tools show, and by which A1111 and Forge list adapters."""
    model, rank = policy.model, str(policy.config.rank)
    learned_from = f"reward {facts.reward_name}" if facts.config.pairs is None else "preferred pairs"
    comment = f"{facts.config.algorithm.name} on {learned_from}, {facts.optimizer_steps} optimizer steps"
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": comment,
        "modelspec.date": facts.date,
        "modelspec.resolution": f"{model.width}x{model.height}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        # Folded: whoever divides alpha by dim gets 1.
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_base_model_version": model.kohya_version or model.architecture,
        "ss_training_comment": comment,
        **model.described(),
    }
    if facts.config.lora.license:
        header["modelspec.license"] = facts.config.lora.license
    return header


def _own_header(policy: Policy, facts: TrainingFacts) -> dict[str, str]:
    """Our own fields, under ``dgpo.``: on which base and reward the adapter was trained, how long, and with what."""
    config, model = facts.config, policy.model
    dumped = json.dumps(without_folders(config.model_dump(mode="json")))
    header = {
        "dgpo.base_model": public_name(model.path),
        "dgpo.base_parts": base_as_text(model.identity, model.prefix),
        "dgpo.algorithm": config.algorithm.name,
        "dgpo.reward": facts.reward_name,
        "dgpo.optimizer_steps": str(facts.optimizer_steps),
        "dgpo.original_alpha": f"{policy.config.alpha:g}",
        "dgpo.config": dumped,
        "dgpo.config_hash": hashlib.sha256(dumped.encode()).hexdigest(),
        "dgpo.packages": json.dumps(package_versions()),
    }
    if config.model.adapter is not None:
        strength = config.model.adapter_strength
        at = "" if strength is None else f" at strength {strength:g}"
        file = Path(config.model.adapter)
        header[ON_TOP_OF] = public_name(str(file.parent if file.stem == "adapter" else file)) + at
        header[ON_TOP_HASH] = model.worn[0]
    if config.training.replanned:
        moves = (f"after iteration {done} its end was moved from {end}" for done, end in config.training.replanned)
        header["dgpo.replanned"] = f"{', '.join(moves)}; now {config.training.iterations}"
    if facts.measured_on:
        header["dgpo.reward_measured_on"] = facts.measured_on
    if facts.accepted:
        header["dgpo.accepted"] = "; ".join(facts.accepted)
    if facts.guard:
        header["dgpo.guard"] = facts.free_of_folders(facts.guard)
    if facts.reward_before is not None:
        header["dgpo.reward_before"] = f"{facts.reward_before:.6f}"
    if facts.reward_after is not None:
        header["dgpo.reward_after"] = f"{facts.reward_after:.6f}"
    notes = {"before": facts.reward_before_note, "after": facts.reward_after_note}
    return header | {f"dgpo.reward_{when}_note": note for when, note in notes.items() if note}
