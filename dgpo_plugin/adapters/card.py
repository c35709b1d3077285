"""An adapter's card: what its file says of itself, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dgpo_plugin.adapters.load import DOWN, _usable, read_adapter
from dgpo_plugin.adapters.save import _tensors_hash
from dgpo_plugin.common.errors import UserError

STEPS = ("dgpo.optimizer_steps", "dgpo.replanned")


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
