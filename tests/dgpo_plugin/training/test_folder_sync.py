"""A file system that cannot sync a folder keeps checkpoints all the same; one that fails is told by what helps."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from dgpo_plugin.training.identity import RunIdentity

pytestmark = [pytest.mark.fast, pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX alone")]

IDENTITY = RunIdentity(config={}, prompts_sha256="prompts", packages={})


def save(run: Path) -> Path:
    progress = Progress(iteration=10, steps=10, started="2026-01-01T00:00:00Z")
    return save_checkpoint(run, IDENTITY, progress, {"policy": {"a": torch.ones(2)}}, keep=1)


def answering(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fsync of a folder, and of a folder alone, answer with an error."""
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF"])
def test_a_file_system_without_folder_sync_is_written_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(getattr(errno, name), monkeypatch)
    path = save(tmp_path)
    assert torch.equal(load_checkpoint(path).tensors["policy"]["a"], torch.ones(2))
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["000010"]


@pytest.mark.parametrize("name", ["EISDIR", "EACCES"])
def test_a_file_system_that_opens_no_folder_is_written_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def opened(path: object, flags: int, *mode: object, **options: object) -> int:
        if flags == os.O_RDONLY and Path(str(path)).is_dir():
            raise OSError(getattr(errno, name), "no")
        return original(path, flags, *mode, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    path = save(tmp_path)
    monkeypatch.undo()
    load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("ENOSPC", "make room, then"),
        ("EDQUOT", "make room, then"),
        ("EROFS", "make that folder writable, then"),
        ("EPERM", "make that folder writable, then"),
        ("EIO", "see to that disk, or copy the run's folder to another one, then"),
        ("ESTALE", "see to that disk"),
    ],
)
def test_a_disk_that_fails_is_told_by_what_helps(
    name: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, name)
    answering(number, monkeypatch)
    with pytest.raises(UserError, match=f"cannot write checkpoint .*000010: {os.strerror(number)}; {cure}"):
        save(tmp_path)
    assert checkpoints(tmp_path) == []
