"""Which pictures a folder holds and in which order, GenEval's layout included; and what of it is left out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.places import exists
from dgpo_plugin.prompts.files import read_prompts

NOT_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
"""What Pillow has a name for, but needs another program to draw (Ghostscript for EPS), or does not draw at all."""
GENEVAL_FILE, GENEVAL_FOLDER = "metadata.jsonl", "samples"


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the picture formats that it reads on this machine."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(NOT_PICTURES)))


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of pictures end, in lower case: everything that is read on this machine."""
    readable = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def natural_key(path: Path) -> tuple[object, ...]:
    """Sorts paths as people count: ``2.png`` before ``10.png``."""
    parts = (*path.parent.parts, path.stem, path.suffix)
    runs = (re.split(r"([0-9]+)", part.casefold()) for part in parts)
    return tuple(tuple(int(run) if at % 2 else run for at, run in enumerate(each)) for each in runs), str(path)


@dataclass
class Found:
    """Pictures on disk.

    Attributes:
        pictures: in their order.
        prompts: of those whose folder says it, GenEval's.
        skipped: a line for each folder of which something is not scored.
        by_hand: pictures that were named one by one, in the order in which they were.
    """

    pictures: list[Path] = field(default_factory=list)
    prompts: dict[Path, Prompt] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    by_hand: list[Path] = field(default_factory=list)


def find_pictures(paths: Sequence[Path]) -> Found:
    """The files as given, folders' pictures in natural order of their names.

    Raises:
        UserError: nothing there.
    """
    found = Found()
    for path in paths:
        if not exists(path):
            raise UserError(f"{path}: no such file; check the path")
        if not path.is_dir():
            found.pictures.append(path)
            found.by_hand.append(path)
            continue
        own = _of_geneval(path)
        pictures = [picture for each in own.values() for picture in each] if own else _pictures_in(path)
        if not pictures:
            folders = [inside.name for inside in path.iterdir() if inside.is_dir()]
            more = (
                f", and {len(folders)} folders (first: {min(folders)}); name these" if folders else "; check the path"
            )
            raise UserError(f"{path}: holds no picture{more}")
        found.pictures += pictures
        for each in own.values():
            found.prompts |= each
        if left := _left(path, own, pictures):
            found.skipped.append(f"{path}: skipped {_told(left, 'other files' if own else 'other formats')}")
    return found


def _left(folder: Path, own: Mapping[Path, Mapping[Path, Prompt]], pictures: Sequence[Path]) -> set[Path]:
    """What of a folder is not scored; of GenEval's prompts' folders, beside what its script writes there."""
    used = {each for each, scored in own.items() if scored} if own else set(pictures)
    left = set() if folder in own else set(folder.iterdir()) - used
    for each in own:
        left |= set((each / GENEVAL_FOLDER).iterdir()) - set(pictures)
    return left


def _pictures_in(folder: Path) -> list[Path]:
    """A folder's pictures, in natural order; a link whose file is gone is one that cannot be read."""
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    inside = (path for path in shown if path.is_file() or not path.exists())
    return sorted((path for path in inside if path.suffix.lower() in suffixes()), key=natural_key)


def _of_geneval(folder: Path) -> dict[Path, Mapping[Path, Prompt]]:
    """Each prompt's folder, and its pictures with their prompt, as GenEval's own script lays them out.

    djghosh13/geneval, ``generation/diffusers_generate.py`` and ``evaluation/evaluate_images.py``: sub-folders of digits
    with ``metadata.jsonl`` (one object) and ``samples/``. One such sub-folder by itself is read too.

    Returns:
        Nothing for any other folder.
    """
    named = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=natural_key)
    prompts = [path for path in named if (path / GENEVAL_FILE).is_file()]
    if folder.name.isdigit() and (folder / GENEVAL_FILE).is_file() and (folder / GENEVAL_FOLDER).is_dir():
        prompts = [folder]
    return {path: _with_prompt(path) for path in prompts}


def _with_prompt(folder: Path) -> Mapping[Path, Prompt]:
    prompts = read_prompts(folder / GENEVAL_FILE)
    if len(prompts) != 1:
        raise UserError(f"{folder / GENEVAL_FILE}: {len(prompts)} prompts; GenEval's folders have one each")
    samples = folder / GENEVAL_FOLDER
    if not samples.is_dir():
        raise UserError(f"{folder}: has no folder {GENEVAL_FOLDER}; put its pictures there, as GenEval's script does")
    return dict.fromkeys(_pictures_in(samples), prompts[0])


def _told(left: Iterable[Path], other: str) -> str:
    """What of a folder is not scored: the first names of each kind.

    Args:
        other: what files are that are neither hidden nor folders.
    """
    kinds: dict[str, list[str]] = {other: [], "hidden": [], "folders": []}
    for path in sorted(left, key=natural_key):
        kinds["hidden" if path.name.startswith(".") else "folders" if path.is_dir() else other].append(path.name)
    return ", ".join(f"{kind} ({shortened(names)})" for kind, names in kinds.items() if names)


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
