"""Prompts from a Hugging Face dataset, where the ``datasets`` package is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dgpo_plugin.common.errors import UserError, in_one_line
from dgpo_plugin.common.prompt import Prompt

COLUMNS = ("prompt", "text", "caption", "Prompt")
"""Where a dataset's texts are looked for if no column is named."""


def load_rows(source: str, name: str, split: str) -> Any:
    """The rows of a dataset's split, of ``train`` where none is named; ``source`` is what messages call it.

    Raises:
        UserError: the package or the dataset is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{source}: needs the datasets package; pip install datasets") from error
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever reading others' files raises
        raise UserError(f"hf:{source}: cannot be loaded ({in_one_line(error)})") from error


def text_column(columns: Sequence[str]) -> str:
    """The column of texts among some; empty if none has a known name."""
    return next((known for known in COLUMNS if known in columns), "")


def read_dataset(source: str) -> list[Prompt]:
    """Prompts of ``owner/name[:split[:column]]``, each text once; other columns of JSON types become metadata.

    Raises:
        UserError: the package or the dataset is not there, or no column holds texts.
    """
    name, split, column = (*source.split(":"), "", "")[:3]
    rows = load_rows(source, name, split)
    columns = list(rows.column_names)
    text = column or text_column(columns)
    if text not in columns:
        raise UserError(f"hf:{source}: has no column of prompts; its columns are {', '.join(columns)}; name one")
    # Preference data has a row a pair, so a text many times: the first counts.
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows):
        if isinstance(row[text], str) and row[text] and row[text] not in prompts:
            prompts[row[text]] = Prompt(row[text], _metadata(row, text), f"hf:{source} row {number}")
    if not prompts:
        raise UserError(f"hf:{source}: column {text} holds no text")
    return list(prompts.values())


def _metadata(row: dict[str, Any], text: str) -> dict[str, Any]:
    kept = {}
    for key, value in row.items():
        try:
            json.dumps(value)
        except TypeError:  # a picture, a date
            continue
        if key != text:
            kept[key] = value
    return kept
