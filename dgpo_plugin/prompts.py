"""Prompts: what the model is asked for, and what a reward needs to know to judge the answer.

A prompt is a text and a JSON-like metadata dictionary. Two file formats are read: ``.txt`` (one
prompt a line) and ``.jsonl`` (one object a line, ``prompt`` and anything else; everything but the
text becomes metadata).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_plugin.errors import UserError
from dgpo_plugin.seeding import derive_seed


@dataclass(frozen=True)
class Prompt:
    """One text to render.

    Attributes:
        text: what the text encoders read.
        metadata: what the reward reads (JSON types only); empty where the text is enough.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a ``.txt`` or ``.jsonl`` file, in the file's order.

    Raises:
        UserError: the file is missing, holds no prompt, or has a line that cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file {path}: the name must end in .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path}: not UTF-8 text; save it as UTF-8") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"prompt file {path}: holds no prompt; write at least one line")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_prompt_from_json(line, f"{path}:{number}") for number, line in numbered]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of texts, metadata and order."""
    lines = [json.dumps([prompt.text, dict(prompt.metadata)], sort_keys=True) for prompt in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _prompt_from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that is nested too deep or holds too long a number") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{where}: needs a JSON object with a non-empty text under "prompt"')
    return Prompt(record.pop("prompt"), record)


def draw_prompt_groups(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts whose groups are sampled in one iteration.

    The prompts are shuffled once per pass and the passes laid end to end, so every prompt is drawn
    equally often, and iteration ``k`` can be asked for without replaying the ones before it.

    Args:
        count: prompts in the set.
        per_iteration: prompt groups an iteration (P).
        iteration: from 0.
        seed: the run's seed.

    Returns:
        P indices in ``[0, count)``.
    """
    positions = range(iteration * per_iteration, (iteration + 1) * per_iteration)
    orders = {epoch: _shuffled(count, epoch, seed) for epoch in {position // count for position in positions}}
    return [orders[position // count][position % count] for position in positions]


def _shuffled(count: int, epoch: int, seed: int) -> Sequence[int]:
    generator = np.random.default_rng(derive_seed(seed, "prompt order", epoch))
    return [int(index) for index in generator.permutation(count)]
