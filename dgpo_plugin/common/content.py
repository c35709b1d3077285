"""What lies at a path, told by its bytes and never by its name or place; what took long to read is remembered.

A file's place, size and times, or the name of a hub's blob, are only keys under which an answer is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import cache_folder, write_text_atomically

T = TypeVar("T")
"""Of what JSON can hold."""
WORTH_KEEPING = 64 << 20
"""Bytes; what was found out of fewer is read again by the next process."""
QUIET_SECONDS, SECONDS_BETWEEN_LINES = 2.0, 10.0
"""How long reading is not spoken of, and then how often."""
BLOCK = 1 << 22

log = logging.getLogger(__name__)
_KNOWN: dict[str, str] = {}
"""Answers as JSON, by their key."""


class ReadingProgress:
    """Says in a line of the log how far a long reading is.

    Args:
        what: is read, as in ``reading the base's transformer``.
        total: bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next = time.monotonic() + QUIET_SECONDS
        self._lock = Lock()

    def advance(self, count: int) -> None:
        """So many more bytes are read; several threads may say so."""
        with self._lock:
            self._done += count
            if time.monotonic() < self._next or self._done >= self._total:
                return
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            log.info("%s, to know it again: %.1f of %.1f GB; once for each file", self._what, *self._gigabytes())

    def _gigabytes(self) -> tuple[float, float]:
        return self._done / 1e9, self._total / 1e9


def path_hash(path: Path, what: str = "") -> str:
    """SHA-256 of a file's bytes, or of a folder's files with their names inside it; hidden ones do not count.

    Args:
        what: for the line about a long reading; empty for the path's name.

    Raises:
        UserError: a file cannot be read.
    """
    files = [path] if path.is_file() else [*_visible(path)]
    names = [] if path.is_file() else [file.relative_to(path).as_posix() for file in files]
    progress = ReadingProgress(f"reading {what or path.name}", sum(file.stat().st_size for file in files))

    def read() -> str:
        digests = [_bytes_hash(file, progress) for file in files]
        return digests[0] if path.is_file() else hashlib.sha256(json.dumps([names, digests]).encode()).hexdigest()

    with _readable():
        return remembered(json.dumps(["bytes", names]), files, read)


def remembered(question: str, files: Sequence[Path], answer: Callable[[], T]) -> T:
    """What ``answer`` finds out of files, asked once as long as they are what they were.

    Args:
        question: tells what is asked from what else is asked of the same files.
    """
    key = json.dumps([question, [stamp(file) for file in files]])
    large = sum(file.stat().st_size for file in files) >= WORTH_KEEPING
    if key not in _KNOWN:
        kept = _kept_at(key) if large else None
        found = _read_kept(kept, key)
        if found is None:
            found = json.dumps(answer())
            if kept is not None:
                with contextlib.suppress(UserError):  # a full or read-only home: read again next time
                    write_text_atomically(kept, json.dumps({"key": key, "answer": found}))
        _KNOWN[key] = found
    value: T = json.loads(_KNOWN[key])
    return value


def stamp(path: Path) -> list[str | int]:
    """What a file is taken for the same by while nobody reads it: place, size and times, or its blob on the hub.

    The hub's cache names large files by their SHA-256, and links to them.
    """
    real = path.resolve()
    state = real.stat()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return [real.name, state.st_size]
    return [str(real), state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _visible(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inside):
            yield file


def _bytes_hash(file: Path, progress: ReadingProgress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(BLOCK), b""):
            digest.update(block)
            progress.advance(len(block))
    return digest.hexdigest()


def _kept_at(key: str) -> Path | None:
    """The file that keeps an answer; None for a user without a home."""
    try:
        return cache_folder() / f"content-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    except RuntimeError:
        return None


def _read_kept(file: Path | None, key: str) -> str | None:
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        json.loads(kept["answer"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # never written, or damaged
    return str(kept["answer"]) if kept.get("key") == key else None


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; check the path") from error
