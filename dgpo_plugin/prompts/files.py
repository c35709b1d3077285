"""Prompts out of files, and the hash of a set of them.

Two file formats are read: ``.txt`` (one
prompt a line) and ``.jsonl`` (one object a line, ``prompt`` and anything else; everything but the
text becomes metadata).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from dgpo_plugin.common.errors import MOST_PROBLEMS, UserError, first_few, is_unicode
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.prompt import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a ``.txt`` or ``.jsonl`` file, in the file's order.

    Raises:
        UserError: the file is missing, holds no prompt, or has a line that cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file {path}: the name must end in .txt or .jsonl")
    try:
        lines = read_text(path, encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path}: not UTF-8 text; save it as UTF-8") from error
    if any("\0" in line for line in lines):
        raise UserError(f"prompt file {path}: has NUL characters, as UTF-16 text has; save it as UTF-8")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"prompt file {path}: holds no prompt; write at least one line")
    if path.suffix == ".txt":
        return [Prompt(line, place=f"{path}:{number}") for number, line in numbered]
    prompts, problems, places = [], [], []
    for number, line in numbered:
        try:
            prompts.append(_prompt_from_json(line, f"{path}:{number}"))
        except UserError as error:
            problems.append(str(error))
            places.append(f"{path}:{number}")
    if problems:
        raise UserError(first_few(problems, "lines", others=places[MOST_PROBLEMS:]))
    return prompts


def read_shipped_prompts(file: str) -> list[Prompt]:
    """Prompts of a list that lies beside this file; its name is their place, whatever folder it is installed in."""
    with resources.as_file(resources.files(__package__) / file) as path:
        return [replace(prompt, place=f"{file}:{number}") for number, prompt in enumerate(read_prompts(path), start=1)]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of a set of prompts: texts, metadata and order."""
    lines = [json.dumps([prompt.text, dict(prompt.metadata)], sort_keys=True) for prompt in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _prompt_from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that is nested too deep or holds too long a number") from error
    if not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise UserError(f"{where}: has half of a character (\\ud800 to \\udfff alone); mend it")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{where}: needs a JSON object with a non-empty text under "prompt"')
    return Prompt(record.pop("prompt"), record, place=where)
