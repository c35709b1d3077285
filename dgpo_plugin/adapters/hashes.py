"""The hashes that people's tools know adapters by: ModelSpec's, and kohya's two.

ModelSpec (github.com/Stability-AI/ModelSpec, ``hash_sha256``): 0x and the SHA-256 of everything after the header.
kohya's sd-scripts (``precalculate_safetensors_hashes``) states the same bytes' as ``sshs_model_hash``, without 0x, and
as ``sshs_legacy_hash`` eight digits of 64 KiB from the first MiB on, of the file as it would be with the fields
``ss_...`` alone. A1111 and Forge look files up by the first twelve digits of ``sshs_model_hash``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELSPEC, KOHYA, KOHYA_LEGACY = "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"
LEGACY_FROM, LEGACY_SIZE = 0x100000, 0x10000


def header_hashes(entries: Mapping[str, Any], data: memoryview, header: Mapping[str, str]) -> dict[str, str]:
    """The three fields for an adapter's header.

    Args:
        entries: safetensors' own, type, shape and offsets by key.
        data: everything after the header.
        header: the other fields.
    """
    whole = hashlib.sha256(data).hexdigest()
    head = head_of(entries, {key: value for key, value in header.items() if key.startswith("ss_")})
    start = max(0, LEGACY_FROM - len(head))
    window = head[LEGACY_FROM:] + data[start : max(start, LEGACY_FROM + LEGACY_SIZE - len(head))].tobytes()
    legacy = hashlib.sha256(window[:LEGACY_SIZE]).hexdigest()[:8]
    return {MODELSPEC: f"0x{whole}", KOHYA: whole, KOHYA_LEGACY: legacy}


def head_of(entries: Mapping[str, Any], header: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the header's length and the header, as safetensors itself lays it out."""
    text = json.dumps({"__metadata__": dict(header), **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_sha256(path: Path) -> str:
    """SHA-256 of everything after a safetensors file's header, 64 hexadecimal digits.

    Raises:
        OSError: the file is gone.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def stated_hashes(header: Mapping[str, str]) -> list[str]:
    """The hashes of all of its data that a header states, as plain digits; ModelSpec's first."""
    found = (header.get(key, "").strip().lower().removeprefix("0x") for key in (MODELSPEC, KOHYA))
    return [digits for digits in found if digits]
