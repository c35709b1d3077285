"""A base's weights are hashed once a process, and again when they have changed."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.load import weights_hash

pytestmark = pytest.mark.fast


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weight files that are opened from here on, in their order."""
    names: list[str] = []
    really = Path.open

    def noted(self: Path, *args: Any, **kwargs: Any) -> io.IOBase:
        if self.suffix == ".safetensors":
            names.append(self.name)
        return really(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noted)
    return names


def a_base(folder: Path) -> Path:
    (folder / "transformer").mkdir(parents=True)
    for name in ("b", "a"):
        (folder / "transformer" / f"{name}.safetensors").write_bytes(f"weights {name}".encode())
    return folder


def test_the_files_are_read_once(tmp_path: Path, opened: list[str]) -> None:
    base = a_base(tmp_path / "base")
    del opened[:]
    found = weights_hash(base)
    assert found == hashlib.sha256(b"weights aweights b").hexdigest()
    assert opened == ["a.safetensors", "b.safetensors"]
    assert weights_hash(base) == found
    assert len(opened) == 2


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    base = a_base(tmp_path / "base")
    before = weights_hash(base)
    file = base / "transformer" / "a.safetensors"
    file.write_bytes(b"weights of another size")
    assert weights_hash(base) == hashlib.sha256(b"weights of another sizeweights b").hexdigest() != before


def test_a_file_of_the_same_size_written_later_is_read_again(tmp_path: Path) -> None:
    base = a_base(tmp_path / "base")
    weights_hash(base)
    file = base / "transformer" / "a.safetensors"
    written = file.stat().st_mtime_ns
    file.write_bytes(b"weights c")
    os.utime(file, ns=(written, written + 1_000_000_000))
    assert weights_hash(base) == hashlib.sha256(b"weights cweights b").hexdigest()


def test_equal_files_elsewhere_have_the_same_hash(tmp_path: Path) -> None:
    assert weights_hash(a_base(tmp_path / "one")) == weights_hash(a_base(tmp_path / "other"))


def test_no_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors weights under transformer/ or unet/"):
        weights_hash(tmp_path)
