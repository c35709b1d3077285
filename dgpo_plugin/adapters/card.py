"""An adapter's card: what its file says of itself, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dgpo_plugin.adapters.load import AdapterFile
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
    architecture: str
    algorithm: str
    reward: str
    reward_before: str
    reward_after: str
    optimizer_steps: str
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
        header, tensors = file.header, file.tensors

        def stated(key: str) -> str:
            return header.get(key, NOT_STATED)

        steps = [header[key] for key in ("dgpo.optimizer_steps", "dgpo.replanned") if key in header]
        return cls(
            file=f"{file.path} ({file.size / 1024:.0f} KiB)",
            title=stated("modelspec.title"),
            base_model=header.get("dgpo.base_model", stated("ss_base_model_version")),
            base_weights=_base_note(header),
            architecture=stated("modelspec.architecture"),
            algorithm=stated("dgpo.algorithm"),
            reward=stated("dgpo.reward"),
            reward_before=stated("dgpo.reward_before"),
            reward_after=stated("dgpo.reward_after"),
            optimizer_steps="; ".join(steps) or NOT_STATED,
            rank=", ".join(map(str, file.ranks)),
            scale=_scale_note(file),
            tensors=f"{len(tensors)}, {sum(tensor.numel() for tensor in tensors.values()):,} parameters",
            date=stated("modelspec.date"),
            license=header.get("modelspec.license", "not stated in the file"),
            config_hash=stated("dgpo.config_hash"),
            content_hash=_hash_note(file),
            packages=_packages_note(header),
        )

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) of every field, in order."""
        return [(name.replace("_", " "), value) for name, value in asdict(self).items()]


def _scale_note(file: AdapterFile) -> str:
    try:
        return file.usable.note
    except UserError as error:
        return f"cannot be applied: {error}"


def _hash_note(file: AdapterFile) -> str:
    stated = file.header.get("modelspec.hash_sha256")
    if stated is None:
        return NOT_STATED
    return f"{stated} ({'matches' if stated == file.content_hash else 'DOES NOT MATCH the tensors'})"


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
