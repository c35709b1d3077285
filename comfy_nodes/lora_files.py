"""Adapters as ComfyUI's loras folders list them: found, read once, put on a model, described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths

from dgpo_plugin.adapters import AdapterCard, AdapterFile
from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.tables import as_table

from .base_weights import base_note
from .matching import PatchedModel, apply_strictly

# With an adapter for the embedded model, so that the example workflows run as they are.
folder_paths.add_model_folder_path("loras", str(Path(__file__).parent / "loras"))


def adapter_names() -> list[str]:
    """The files that the loras folders list."""
    return list(folder_paths.get_filename_list("loras"))


def time_of_change(name: str) -> int | None:
    """When a file was last written, in nanoseconds; None if it is gone."""
    path = folder_paths.get_full_path("loras", name)
    return None if path is None else Path(path).stat().st_mtime_ns


def read_listed(name: str) -> AdapterFile:
    """Read a file that the loras folders list.

    Raises:
        UserError: it is gone, or no adapter.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise UserError("not in the loras folders any more; press R to read them again")
    return AdapterFile.read(Path(path))


def loaded_adapter(model: Any, name: str, strength: float) -> tuple[Any, str]:
    """A clone of a ComfyUI model with an adapter on it, and a text that says what was done and what the adapter is.

    Raises:
        UserError: the file is gone, no adapter, unusable, or for another model.
    """
    with prefixed(f"adapter {name}"):
        file = read_listed(name)
        patched = apply_strictly(model, file, strength)
    applied = [
        ("keys", _keys_note(patched)),
        ("scale", file.usable.note),
        ("strength", f"{strength:g}"),
        ("base", base_note(model, file.header)),
    ]
    return patched.model, as_table(applied + [row for row in card_rows(file, name) if row[0] != "scale"])


def _keys_note(patched: PatchedModel) -> str:
    """How many of a file's keys are on the model, what they are if not LoRA, and which were left out."""
    kinds = [f"{count} {kind}" for kind, count in patched.kinds.items()]
    note = f"{patched.matched} of {patched.total} matched" + (f" ({', '.join(kinds)} among them)" if kinds else "")
    if patched.for_text:
        note += f"; {len(patched.for_text)} for the text encoder left out (ComfyUI's Load LoRA takes a CLIP)"
    return note


def adapter_text(name: str) -> str:
    """An adapter's card as text.

    Raises:
        UserError: the file is gone, or no adapter.
    """
    with prefixed(f"adapter {name}"):
        return as_table(card_rows(read_listed(name), name))


def card_rows(file: AdapterFile, name: str) -> list[tuple[str, str]]:
    """A card's (label, value) rows, the file under the name that ComfyUI lists it by."""
    return replace(AdapterCard.of(file), file=name).rows()
