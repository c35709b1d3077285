"""One process at a time, for what several workers of pytest would make at once."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parents[1] / ".cache-tests"
"""What tests fetched and keep, and their locks; ignored by git."""


def locked(name: str) -> FileLock:
    """A lock of that name over all processes that test this tree, to be entered by ``with``."""
    CACHE.mkdir(exist_ok=True)
    return FileLock(CACHE / f"{name}.lock")
