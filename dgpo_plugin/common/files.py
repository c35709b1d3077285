"""Files are written to a temporary name and renamed, so that none is ever half-written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dgpo_plugin.common.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it becomes ``path`` if the block ends well.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder with free space") from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        UserError: as :func:`atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
