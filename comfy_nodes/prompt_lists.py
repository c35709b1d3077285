"""Prompts out of a text field or a shipped set."""

from __future__ import annotations

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.registry import DATASET, load_prompts

from .types import written_lines

OWN_TEXT = "the text below"
"""The source that stands for the text field, beside the shipped sets."""


def chosen_prompts(source: str, text: str, start: int, count: int) -> list[Prompt]:
    """So many prompts of a source, after leaving out the first.

    Args:
        source: :data:`OWN_TEXT` or a shipped set's name.
        start: how many to leave out.
        count: how many to take; 0 takes all there are.

    Raises:
        UserError: there are none to take.
    """
    found = own_prompts(text) if source == OWN_TEXT else load_prompts(source)
    chosen = found[start : start + count if count else None]
    if not chosen:
        raise UserError(f"Prompt list: start {start} is behind the last of {len(found)} prompts; lower it")
    return chosen


def own_prompts(text: str) -> list[Prompt]:
    """One prompt per line; or, if there is one line that names a file or a dataset, what is in there.

    Raises:
        UserError: the text is empty, or what it names cannot be read.
    """
    lines = written_lines(text)
    if not lines:
        raise UserError("Prompt list: the text is empty; write one prompt per line")
    if len(lines) == 1 and (lines[0].endswith((".txt", ".jsonl")) or lines[0].startswith(DATASET)):
        return load_prompts(lines[0])
    return [Prompt(line) for line in lines]
