"""Files of tensors, looked at before anything reads them: whole, and safetensors indeed, or what they are instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError

LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows a header (``MAX_HEADER_SIZE`` of its Rust source)."""
AGAIN = "download it again"
_KNOWN_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file it stands for; run `git lfs pull` in its folder"),
    (
        b"PK\x03\x04",
        "is a zip archive, as of torch.save; pickles are not read: take the safetensors, or save it as one",
    ),
    (b"\x80", "is a pickle, as of torch.save; pickles are not read: take the safetensors, or save it as one"),
    (b"GGUF", "is a GGUF file; take the safetensors"),
    (b"\x1f\x8b", "is compressed (gzip); unpack it"),
)
_WEB_PAGE = re.compile(rb"<(!doctype|html|head|body|\?xml)", re.IGNORECASE)


def stand_in(path: Path) -> str | None:
    """What a file is instead of what its name says, and what to do; None if its first bytes give nothing away.

    Such files come with a repository cloned without Git LFS, from a site that wanted a password, from a full disk.
    """
    with path.open("rb") as stream:
        start = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return f"is empty; {AGAIN}"
    if not start.strip(b"\0"):
        return f"begins with nothing but zeros, as of a download that was never finished; {AGAIN}"
    if _WEB_PAGE.match(start):
        return f"is a web page, not the file it was to be; {AGAIN}, signed in if the site wants that"
    return next((said for known, said in _KNOWN_STARTS if start.startswith(known)), None)


def tensor_header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, by name: ``dtype``, ``shape`` and ``data_offsets``; no tensor is read.

    Eight bytes say how long the header is, then comes the header, as JSON, then the tensors' bytes
    (https://huggingface.co/docs/safetensors: Format).

    Raises:
        UserError: the file cannot be read, is another kind of file, or is not all there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            sane = 2 <= length <= min(LARGEST_HEADER, size - 8)
            header = json.loads(stream.read(length)) if sane else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} {stand_in(path) or _not_safetensors(path, size)}")
    header.pop("__metadata__", None)
    try:
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} has a damaged header; {AGAIN}") from error
    if size < expected:
        raise UserError(f"{path} is cut off: {size:,} of {expected:,} bytes are there; {AGAIN}")
    if size > expected:
        raise UserError(f"{path} has {size - expected:,} bytes more than its header says: damaged; {AGAIN}")
    return header


def _not_safetensors(path: Path, size: int) -> str:
    """How an unknown file is described: a text by its beginning, as a site's refusal; others by their size."""
    with path.open("rb") as stream:
        start = stream.read(60)
    # A whole header would begin with its length, of eight bytes.
    said = start.decode("ascii", "replace")
    if all(character.isprintable() or character.isspace() for character in said) and "\ufffd" not in said:
        return f"is a text that begins with {' '.join(said.split())!r}, not safetensors; {AGAIN}"
    return f"is no safetensors file, or was cut off in its header ({size:,} bytes are there); {AGAIN}"
