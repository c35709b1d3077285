"""What lies where weights were to be: files that people really had, and what is to be said of each."""

from __future__ import annotations

import pickle
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943\nsize 246144152\n"

STAND_INS: dict[str, tuple[bytes, str]] = {
    "LFS pointer": (POINTER, "is a Git LFS pointer.*`git lfs pull`"),
    "LFS pointer with CRLF": (POINTER.replace(b"\n", b"\r\n"), "is a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>" * 20, "is a web page"),
    "web page after blank lines": (b"\n\n  <html lang='en'>" + b" " * 2000, "is a web page"),
    "XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "JSON error": (
        b'{"error": "Access to model FLUX.1-dev is restricted."}',
        "is JSON, such as a server's error .*FLUX",
    ),
    "refusal": (b"Invalid username or password.", r"is text \(Invalid username or password.\)"),
    "not found": (b"Entry not found", r"is text \(Entry not found\)"),
    "few bytes": (b"404", "is 3 bytes long"),
    "empty": (b"", "is empty; .*fetch it again"),
    "zeros": (bytes(5000), "is nothing but zeros.*fetch it again"),
    "zip": (b"PK\x03\x04" + bytes(200), "is a zip archive.*a pickle.*never loaded"),
    "pickle": (pickle.dumps({"a": list(range(300))}), "is a pickle.*never loaded"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(100), "is a gzip archive"),
    "noise": (b"\xfe\xed\xfa\xce\x01\x02\x03\x04" * 30, "is no safetensors file, or a damaged one"),
}
"""Content by kind, and a pattern of what is said of it."""

CUT = ("in its tensors", "before its tensors", "in its header", "in its first bytes")
"""Places where a download ended."""


def cut(file: Path, where: str) -> str:
    """End a sound safetensors file at a place of :data:`CUT`; returns a pattern of what is to be said of it."""
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    length = {"in its tensors": len(content) - 1, "before its tensors": header, "in its header": header - 20}
    file.write_bytes(content[: length.get(where, 5)])
    return "is (cut|5 bytes long)"
