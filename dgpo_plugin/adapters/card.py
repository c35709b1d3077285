"""An adapter's card: what its file says of itself, for people."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import torch

from dgpo_plugin.adapters.hashes import KOHYA, MODELSPEC
from dgpo_plugin.adapters.kinds import ALPHA, LORA, by_kind, is_down, is_matrix
from dgpo_plugin.adapters.load import ON_TOP_OF, STORED, AdapterFile
from dgpo_plugin.adapters.scale import OWN_ALPHA
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.base_identity import base_from_text

NOT_STATED = "-"


@dataclass(frozen=True)
class AdapterCard:
    """What ``dgpo inspect`` and the ComfyUI nodes show of an adapter: each a line of text, ``-`` if it is not stated.

    The texts are the file's own words: whoever shows them must not trust them
    (:func:`dgpo_plugin.common.tables.as_table`).
    """

    file: str
    title: str
    base_model: str
    base_weights: str
    on_top_of: str
    architecture: str
    algorithm: str
    reward: str
    reward_before: str
    reward_after: str
    optimizer_steps: str
    accepted: str
    guard: str
    rank: str
    scale: str
    tensors: str
    date: str
    license: str
    config_hash: str
    content_hash: str
    packages: str

    @classmethod
    def of(cls, file: AdapterFile) -> AdapterCard:
        """The card of a file that was read, whether it can be applied or not."""
        header = file.header

        def stated(key: str) -> str:
            return header.get(key, NOT_STATED)

        steps = [header[key] for key in ("dgpo.optimizer_steps", "dgpo.replanned") if key in header]
        return cls(
            file=f"{file.path} ({file.size / 1024:.0f} KiB)",
            title=stated("modelspec.title"),
            base_model=header.get("dgpo.base_model", stated("ss_base_model_version")),
            base_weights=_base_note(header),
            on_top_of=stated(ON_TOP_OF),
            architecture=stated("modelspec.architecture"),
            algorithm=stated("dgpo.algorithm"),
            reward=stated("dgpo.reward"),
            reward_before=_measured(header, "dgpo.reward_before"),
            reward_after=_measured(header, "dgpo.reward_after"),
            optimizer_steps="; ".join(steps) or NOT_STATED,
            accepted=stated("dgpo.accepted"),
            guard=stated("dgpo.guard"),
            rank=", ".join(map(str, file.ranks)) or NOT_STATED,
            scale=_scale_note(file),
            tensors=_tensors_note(file),
            date=stated("modelspec.date"),
            license=header.get("modelspec.license", "not stated in the file"),
            config_hash=stated("dgpo.config_hash"),
            content_hash=_hash_note(file),
            packages=_packages_note(header),
        )

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) of every field, in order."""
        return [(name.replace("_", " "), value) for name, value in asdict(self).items()]


def _count(keys: Collection[str]) -> str:
    """How many tensors, and in brackets how many of them are no LoRA of the denoiser, by kind."""
    others = [f"{len(of_it)} {kind}" for kind, of_it in by_kind(keys).items() if kind not in (LORA, ALPHA)]
    return f"{len(keys)} ({', '.join(others)})" if others else str(len(keys))


def _scale_note(file: AdapterFile) -> str:
    try:
        return file.usable.note
    except UserError as error:
        return f"cannot be applied: {error}"


def _measured(header: Mapping[str, str], key: str) -> str:
    """A mean reward; of what prompts, and over how many pictures where some could not be scored, if that is stated."""
    if key not in header:
        return NOT_STATED
    notes = [header[name] for name in ("dgpo.reward_measured_on", f"{key}_note") if name in header]
    return f"{header[key]} ({', '.join(notes)})" if notes else header[key]


def _tensors_note(file: AdapterFile) -> str:
    tensors = file.tensors
    note = f"{_count(tensors)}, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"
    ups = [tensor for key, tensor in tensors.items() if is_matrix(key) and not is_down(key)]
    only_lora = by_kind(tensors).keys() <= {LORA, ALPHA}
    zeros = all(tensor.dtype in STORED and not bool(tensor.to(torch.float32).any()) for tensor in ups)
    return f"{note}, all zeros: it changes nothing" if only_lora and ups and zeros else note


def _hash_note(file: AdapterFile) -> str:
    if file.is_as_stated is None:
        return NOT_STATED
    stated = file.header.get(MODELSPEC) or file.header[KOHYA]
    if file.is_as_stated:
        return f"{stated} (matches)"
    if OWN_ALPHA in file.header:
        return f"{stated} (DOES NOT MATCH the tensors)"
    return (
        f"{stated} (by another rule, or of the file that this was made from; these tensors' is 0x{file.content_hash})"
    )


def _base_note(header: Mapping[str, str]) -> str:
    """The parts of the base with the first digits of their hashes."""
    parts = base_from_text(header.get("dgpo.base_parts", ""))
    return ", ".join(f"{name} {part.digest[:12]}" for name, part in parts.items() if part.digest) or NOT_STATED


def _packages_note(header: Mapping[str, str]) -> str:
    try:
        versions = json.loads(header.get("dgpo.packages", "{}"))
        return ", ".join(f"{name} {number}" for name, number in versions.items()) or NOT_STATED
    except (ValueError, AttributeError, RecursionError):
        return "cannot be read"
