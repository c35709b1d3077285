"""Pictures from the same noise at several checkpoints, as a slider that needs no script."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import read_bytes

from ..records import BASE, Results
from .numbers import format_amount

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Strip:
    """One gallery picture as a data URI.

    Attributes:
        stops: of the slider at which it is shown; the last one stays where its entry has fewer than others.
        alt: for who cannot see it.
    """

    uri: str
    stops: list[int]
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Every entry's pictures, in order, and the slider's stops.

    Attributes:
        stops: what each stop is called.
        entries: (name, strips) of each.
    """

    stops: list[str]
    entries: list[tuple[str, list[Strip]]]


def gallery(results: Results, folder: Path) -> Gallery:
    """The gallery's pictures as data URIs: the base first, then the entries in order; none where none lies beside the
    results, as in those that are passed on without them.

    Raises:
        UserError: a picture is of no entry, is missing where others are there, cannot be read, is not a PNG, or lies
            outside the folder (a page that is passed on must not carry some other picture of the disk).
    """
    known = [BASE, *results.entries]
    for name in results.galleries:
        if name not in known:
            raise UserError(f"results: a gallery of {name!r}, which is none of {known}")
    if not any((folder / path).exists() for paths in results.galleries.values() for path in paths):
        return Gallery([], [])
    order = [name for name in known if results.galleries.get(name)]
    count = max((len(results.galleries[name]) for name in order), default=0)
    prompts = "; ".join(results.gallery_prompts)
    entries = []
    for name in order:
        paths, title = results.galleries[name], "Base" if name == BASE else results.entries[name].label
        strips = []
        for index, path in enumerate(paths):
            stops = [index] if index + 1 < len(paths) else list(range(index, count))
            strips.append(Strip(data_uri(folder, path), stops, f"Samples of {title}, one per prompt: {prompts}"))
        entries.append((title, strips))
    return Gallery([_stop(results, index, count) for index in range(count)], entries)


def _stop(results: Results, index: int, count: int) -> str:
    """What a stop is called: its checkpoint's cost, where the longest cells agree on it."""
    longest = [cell for cell in results.cells if len(cell.checkpoints) == count]
    costs = {format_amount(cell.checkpoints[index].denoiser_evaluations) for cell in longest}
    return f"{costs.pop()} evaluations" if len(costs) == 1 else f"checkpoint {index}"


def data_uri(folder: Path, name: str) -> str:
    """A picture of a folder as it stands in a page.

    Raises:
        UserError: it lies elsewhere, is missing, or is no PNG.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except ValueError as error:  # a NUL character, or half of a character
        raise UserError(f"gallery picture {path}: no file can be called so; compare again") from error
    if not inside:
        raise UserError(f"gallery picture {path}: lies outside {folder}; run `dgpo-bench compare` again")
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(
            f"gallery picture {path}: {error.strerror}; keep the pictures beside results.json or compare again"
        ) from error
    if not data.startswith(_PNG_SIGNATURE):
        raise UserError(f"gallery picture {path}: not a PNG file; run `dgpo-bench compare` again")
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
