"""Rows of a label and a value, as text."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo_plugin.common.errors import printable


def as_table(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of text for (label, value) rows, the values under each other, their control characters written out.

    What a stranger's header says must neither forge a row nor speak to the terminal.
    """
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {printable(value)}" for label, value in rows)
