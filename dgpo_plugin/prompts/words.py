"""Word lists that lie beside this file."""

from __future__ import annotations

from importlib import resources


def read_words(file: str) -> tuple[str, ...]:
    """The lines of a word list beside this file."""
    return tuple((resources.files(__package__) / file).read_text(encoding="utf-8").splitlines())
