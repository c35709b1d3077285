"""Prompts by name: the embedded world's, GenEval's and OCR's kinds, a file, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Callable

from dgpo_plugin.errors import UserError, did_you_mean
from dgpo_plugin.prompt_sets import geneval, ocr
from dgpo_plugin.prompt_sets.datasets import read_dataset
from dgpo_plugin.prompts import Prompt, read_prompts
from dgpo_plugin.worlds.shapes import scenes

PROMPT_SETS: dict[str, Callable[[], list[Prompt]]] = {
    "shapes/train": scenes.train_prompts,
    "shapes/held-out": scenes.held_out_prompts,
    "shapes/out-of-domain": scenes.out_of_domain_prompts,
    "geneval/train": geneval.train_prompts,
    "geneval/test": geneval.test_prompts,
    "ocr/train": ocr.train_prompts,
    "ocr/test": ocr.test_prompts,
}
DATASET = "hf:"
"""``hf:owner/name``, ``hf:owner/name:split`` or ``hf:owner/name:split:column``."""


def load_prompts(source: str) -> list[Prompt]:
    """A built-in prompt set by name, a ``.txt`` / ``.jsonl`` file, or ``hf:`` and a dataset's name.

    Raises:
        UserError: none of them, or what cannot be read.
    """
    if source in PROMPT_SETS:
        return PROMPT_SETS[source]()
    if source.startswith(DATASET):
        return read_dataset(source.removeprefix(DATASET))
    if not source.endswith((".txt", ".jsonl")):
        raise UserError(
            f"no prompt set {source!r}{did_you_mean(source, PROMPT_SETS)}; "
            f"or name a .txt or .jsonl file, or {DATASET}owner/dataset"
        )
    return read_prompts(source)
