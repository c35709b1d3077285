"""Embedded worlds: a tiny pipeline with its prompts and its verifier, so that everything runs with nothing else."""

from __future__ import annotations

from collections.abc import Callable

from dgpo_plugin.config import did_you_mean
from dgpo_plugin.errors import UserError
from dgpo_plugin.prompts import Prompt, read_prompts
from dgpo_plugin.worlds.shapes import scenes

PROMPT_SETS: dict[str, Callable[[], list[Prompt]]] = {
    "shapes/train": scenes.train_prompts,
    "shapes/held-out": scenes.held_out_prompts,
    "shapes/out-of-domain": scenes.out_of_domain_prompts,
}


def load_prompts(source: str) -> list[Prompt]:
    """A built-in prompt set by name, or a ``.txt`` / ``.jsonl`` file.

    Raises:
        UserError: neither, or a file that cannot be read.
    """
    if source in PROMPT_SETS:
        return PROMPT_SETS[source]()
    if not source.endswith((".txt", ".jsonl")):
        raise UserError(f"no prompt set {source!r}{did_you_mean(source, PROMPT_SETS)}; or name a .txt or .jsonl file")
    return read_prompts(source)
