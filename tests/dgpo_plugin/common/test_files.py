"""Whatever happens while a file is written, it is the old one or the new one, and nothing is left beside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, remove_temporaries, write_text_atomically, writing

pytestmark = pytest.mark.fast


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.json"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
        assert temporary.parent == target.parent  # the same disk, so that the rename is atomic
        assert temporary.suffix == target.suffix
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.json"]


def test_the_old_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old and longer")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old and longer"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_on_an_exception_the_old_file_stays_and_nothing_else_does(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_why_it_could_not_be_written_is_told_though_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only file system has it: it refuses to remove what is not there, too."""

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)

    def fail() -> None:
        with atomic_path(tmp_path / "a.txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"^cannot write .*a\.txt: No space left on device; choose a writable folder"):
        fail()


def test_an_error_without_a_number_is_told_by_its_message(tmp_path: Path) -> None:
    """Pillow's errors are of Python's class for files."""
    expected = r"a\.png: OSError: encoder error -2 when writing image file; choose"
    with pytest.raises(UserError, match=expected), writing(tmp_path / "a.png"):
        raise OSError("encoder error -2 when writing image file")


def test_what_killed_processes_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.123.tmp.json", ".b.12.tmp", ".lock", ".tmp", "a.12.tmp", ".a.tmp.json", ".hidden.png"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted([".lock", ".tmp", "a.12.tmp", ".a.tmp.json", ".hidden.png"])
    remove_temporaries(tmp_path / "none")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    # A file in the folder's place: tests may run as root, whom permissions do not stop.
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "below" / "a.txt"
    with pytest.raises(UserError, match="cannot write") as caught:
        write_text_atomically(target, "text")
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        write_text_atomically(tmp_path / "a.txt", "text")
    assert names(tmp_path) == ["a.txt"]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "é ☃")
    assert (tmp_path / "a.txt").read_bytes() == "é ☃".encode()
