"""Files written to a temporary name and renamed, so that none is ever half-written; and read where they are files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from dgpo_plugin.common.errors import UserError, in_one_line

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.[^.]+)?")
"""The names that :func:`atomic_path` writes to."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the disk's errors in the block as one line about ``path``.

    Raises:
        UserError: the folder cannot be written to or is gone, the disk is full, ...
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose a writable folder with free space") from error


def reason(error: OSError) -> str:
    """What the system says of a file; Pillow's errors are of this class too, and have a message of their own."""
    return error.strerror or in_one_line(error)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it becomes ``path`` if the block ends well.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        # What a read-only disk says of a file that is not there must not hide why it is not.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; for who knows that none is at work in the folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        UserError: as :func:`atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_no_file(path: Path) -> int:
    """Refuse what opening would wait for or never end to read: a pipe, a device, a socket; and a folder.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: there is no file of that name, it is none, or nothing can be called so.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a NUL character, or half of a character
        raise OSError(errno.EINVAL, "no file can be called so", str(path)) from error
    kinds = {
        stat.S_IFDIR: "is a folder, not a file",
        stat.S_IFIFO: "is a pipe, not a file",
        stat.S_IFSOCK: "is a socket, not a file",
    }
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, kinds.get(stat.S_IFMT(found.st_mode), "is a device, not a file"), str(path))
    return found.st_size


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """A whole file, of at most so many bytes.

    Raises:
        OSError: as :func:`refuse_no_file`; it cannot be read, or is larger.
    """
    size = refuse_no_file(path)
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the {most:,} that are read", str(path))
    return path.read_bytes()


def read_text(path: Path, most: int | None = None, encoding: str = "utf-8") -> str:
    """A whole text file, its line ends as ``\\n``, whichever system wrote them.

    Raises:
        OSError: as :func:`read_bytes`.
        UnicodeDecodeError: it is not in that encoding.
    """
    return read_bytes(path, most).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def cache_folder() -> Path:
    """The folder where the user's system keeps what can be made again.

    Raises:
        RuntimeError: the user has no home.
    """
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dgpo-plugin"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dgpo-plugin"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgpo-plugin"
