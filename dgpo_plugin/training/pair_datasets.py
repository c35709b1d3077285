"""Preferred pairs in a Hugging Face dataset, where the ``datasets`` package is installed: a row a pair.

Its columns are ``chosen`` and ``rejected``, or two pictures and which of them was preferred, as Pick-a-Pic has them.
Pictures stay where they are, and are read row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.datasets import load_rows, text_column
from dgpo_plugin.rewards.picture_files import read_picture, read_picture_bytes

CHOSEN, REJECTED = "chosen", "rejected"
"""Columns of a dataset or a table; in a prompt's folder, how the names of pictures begin."""
COMPARED = ("jpg", "image")
"""What two columns of pictures are called before ``_0`` and ``_1``."""
LABEL = "label_0"
"""Whether the first of two was preferred: 1 or 0; anything else, as a half, is a tie."""


@dataclass(frozen=True)
class RowPicture:
    """A picture of a dataset's row, in the place of a file.

    Attributes:
        source: ``owner/name[:split]``.
        row: from 0 on.
    """

    source: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{_place(self.source, self.row)}, {self.column}"

    @property
    def name(self) -> str:
        """What to call it beside the other one of its row."""
        return self.column

    def read(self) -> Tensor:
        """The picture, (3, H, W) in [0, 1].

        Raises:
            UserError: there is none that can be read.
        """
        value: Any = _rows(self.source)[self.row][self.column]
        file: Any = None
        if isinstance(value, dict):  # a column of pictures that is not decoded
            value, file = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            return read_picture_bytes(value, str(self))
        if isinstance(file, str):
            return read_picture(Path(file))
        raise UserError(f"{self}: holds no picture")


Found = tuple[Prompt, RowPicture, RowPicture]
"""A prompt, its chosen and its rejected picture."""


def dataset_pairs(source: str) -> tuple[list[Found | str], list[str]]:
    """The pairs of ``owner/name[:split]``, or a problem for each row that is none; and a line about ties.

    Raises:
        UserError: the package or the dataset is not there, or it has no such columns.
    """
    rows = _rows(source)
    columns = list(rows.column_names)
    text = text_column(columns)
    pictures = _picture_columns(columns)
    if not text or not pictures:
        raise UserError(
            f"hf:{source}: has no pairs of pictures: needs a column prompt with {CHOSEN} and {REJECTED}, or with "
            f"jpg_0, jpg_1 and {LABEL}; its columns are {', '.join(columns)}"
        )
    found, ties = list[Found | str](), 0
    for number, row in enumerate(rows.select_columns([text] if CHOSEN in pictures else [text, LABEL])):
        if not isinstance(row[text], str) or not row[text].strip():
            found.append(f"{_place(source, number)}: has no prompt under {text}")
            continue
        chosen, rejected = pictures
        if CHOSEN not in pictures:
            if row[LABEL] not in (0, 1):
                ties += 1
                continue
            chosen, rejected = pictures if row[LABEL] == 1 else pictures[::-1]
        prompt = Prompt(row[text], place=_place(source, number))
        found.append((prompt, RowPicture(source, number, chosen), RowPicture(source, number, rejected)))
    lines = [f"{ties} of {len(rows)} rows of hf:{source} prefer neither picture and are left out"] if ties else []
    return found, lines


def _picture_columns(columns: Sequence[str]) -> tuple[str, str] | None:
    """The two columns of pictures: the chosen and the rejected ones, or the two that a label tells apart."""
    if CHOSEN in columns and REJECTED in columns:
        return CHOSEN, REJECTED
    known = ((f"{name}_0", f"{name}_1") for name in COMPARED)
    return next((two for two in known if LABEL in columns and set(two) <= set(columns)), None)


def _place(source: str, row: int) -> str:
    return f"hf:{source} row {row}"


@functools.lru_cache(maxsize=2)
def _rows(source: str) -> Any:
    """A dataset, its pictures as they are stored; loaded once, those for training and those held out."""
    name, _, split = source.partition(":")  # a split may have colons too, as in train[:1000]
    rows = load_rows(source, name, split)
    from datasets import Image

    for column in [column for column, feature in rows.features.items() if isinstance(feature, Image)]:
        rows = rows.cast_column(column, Image(decode=False))
    return rows
