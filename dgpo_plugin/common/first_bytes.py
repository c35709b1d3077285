"""What a file is instead of the safetensors that it should be, told from its first bytes; nothing in it is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dgpo_plugin.common.files import refuse_no_file

HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header: what the reference implementation takes (safetensors/src/tensor.rs)."""
_PICKLE = re.compile(rb"^(\x80[\x01-\x05]|\([dlt][p0-9]|c[\w.]+\n\w+\n)")
_CONVERT = "fetch the .safetensors, or convert it where you trust it"
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`"),
    (b"GGUF", "a GGUF file (llama.cpp's format); fetch the .safetensors"),
    (b"\x89HDF", "an HDF5 file (Keras); fetch the .safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89PNG", "a PNG picture; the download took the preview, fetch the model's own file"),
    (b"\xff\xd8\xff", "a JPEG picture; the download took the preview, fetch the model's own file"),
)


def what_instead(path: Path) -> str | None:
    """What a file is that was taken for safetensors, and what to do; None if it begins and ends as one.

    Raises:
        OSError: it cannot be read.
    """
    size = refuse_no_file(path)
    with path.open("rb") as file:
        start = file.read(4096)
        told = _told(start, size)
        if told:
            return told
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > HEADER_LIMIT:
            return None
        file.seek(8)
        return _cut(size, length, file.read(length))


def what_instead_of_torch(path: Path) -> str | None:
    """What a file is that was taken for a torch checkpoint (zip or pickle), and what to do; None if it may be one.

    Raises:
        OSError: it cannot be read.
    """
    size = refuse_no_file(path)
    with path.open("rb") as file:
        start = file.read(4096)
    return None if start.startswith(b"PK") or _PICKLE.match(start) else _told(start, size)


def _told(start: bytes, size: int) -> str | None:
    """What its beginning says, unless that is a safetensors header's."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if size == 0:
        return "empty; the download failed, fetch it again"
    if size < 8:
        return f"{size} bytes long; the download failed, fetch it again"
    if not start.strip(b"\0"):
        return "nothing but zeros at its beginning; the download failed, fetch it again"
    known = next((said for begin, said in _STARTS if start.startswith(begin)), None)
    if known:
        return known
    if text[:1] == b"<" or b"<html" in text[:1024].lower():
        return "a web page, such as a login or an error; fetch the file itself (a token may be needed)"
    if text[:1] in (b"{", b"[") and b"\0" not in start[:8]:
        return f"JSON, such as a server's error ({_shown(text)}); fetch the file itself (a token may be needed)"
    if start.startswith(b"PK"):
        return (
            "a zip archive, as .pt, .ckpt and .bin are: a pickle, which can run code and is never loaded; " + _CONVERT
        )
    if _PICKLE.match(start):
        return "a pickle, which can run code and is never loaded; " + _CONVERT
    if size < 4096 and _is_text(start):
        return f"text ({_shown(start)}); fetch the file itself (a token may be needed)"
    return None


def _cut(size: int, length: int, header: bytes) -> str | None:
    """Whether a safetensors file is shorter than its header says."""
    if len(header) < length:
        return f"cut: {size:,} bytes, and its header alone has {length + 8:,}; fetch it again"
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        due = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return f"cut: {size:,} of {due:,} bytes; fetch it again" if size < due else None


def _shown(text: bytes) -> str:
    """The first line of it, fit for a message."""
    line = text.decode("utf-8", "replace").strip().splitlines()[0][:80]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _is_text(start: bytes) -> bool:
    try:
        return start.decode("utf-8").replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    except UnicodeDecodeError:
        return False
