"""What people have instead of a safetensors file, told from its first bytes."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dgpo_plugin.common.first_bytes import what_instead

pytestmark = pytest.mark.fast

GOOD = save({"a": torch.ones(4, 4)}, {"x": "y"})


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"\x80\x02}q\x00.")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (GOOD[:5], "5 bytes long"),
        (GOOD[:20], "cut: 20 bytes, and its header alone has"),
        (GOOD[:-1], f"cut: {len(GOOD) - 1} of {len(GOOD)} bytes"),
        (bytes(5000), "nothing but zeros"),
        (b"<!DOCTYPE html>\n<html lang='en'>", "a web page"),
        (b"\n\n  <HTML><head>", "a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied", "a web page"),
        (b'{"error":"Invalid username or password."}', "JSON, such as a server's error"),
        (b'\n{"err": {"code": 403}}', "JSON, such as a server's error"),
        (b'["not here"]', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (zipped(), "a zip archive, as .pt, .ckpt and .bin are"),
        (pickle.dumps({"a": 1}), "a pickle, which can run code and is never loaded"),
        (pickle.dumps({"a": 1}, 2), "a pickle"),
        (pickle.dumps({"a": 1}, 0), "a pickle"),
        (pickle.dumps(print, 0), "a pickle"),
        (b"Access to this model is restricted.", "text (Access to this model"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "a GGUF file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "a gzip archive"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
    ],
)
def test_what_it_is_instead(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    said = what_instead(path)
    assert said is not None
    assert said.startswith(told)
    assert "\n" not in said
    assert said.isprintable()


@pytest.mark.parametrize("padding", [0, 1, 7, 40, 59, 60, 61, 200])
def test_a_good_one_is_nothing_else(tmp_path: Path, padding: int) -> None:
    """Whatever its header's length, of which the first byte may look like a brace or a tag."""
    path = tmp_path / "file.safetensors"
    for length in range(padding, padding + 8):
        path.write_bytes(save({"a": torch.ones(4, 4)}, {"x": "y" * length}))
        assert what_instead(path) is None
