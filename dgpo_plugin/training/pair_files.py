"""Preferred pairs: tables, folders and datasets of them read, every picture looked at, all mistakes told at once."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dgpo_plugin.common.errors import MOST_PROBLEMS, UserError, first_few
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.registry import DATASET
from dgpo_plugin.rewards.picture_files import read_picture
from dgpo_plugin.rewards.picture_folders import natural_key, suffixes
from dgpo_plugin.rewards.picture_prompts import TABLES, read_rows
from dgpo_plugin.training.pair_datasets import CHOSEN, REJECTED, RowPicture, dataset_pairs

TABLE, PROMPT_FILE = "pairs", "prompt.txt"
"""What a folder's table is called, but for its ending, and the file that says the prompt of a prompt's folder."""
Picture: TypeAlias = Path | RowPicture
LARGEST_SCALE = 2.0
"""By what a picture may be enlarged to the model's size; beyond that a model would learn the blur."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, of which one was preferred.

    Attributes:
        prompt: its place is the pair's, as ``pairs.csv:3``.
        chosen, rejected: the pictures' files, or where in a dataset they are.
        hashes: SHA-256 of what is seen of each, as :func:`seen_hash`.
    """

    prompt: Prompt
    chosen: Picture
    rejected: Picture
    hashes: tuple[str, str] = ("", "")

    @property
    def files(self) -> tuple[Picture, Picture]:
        """Both pictures, the chosen one first."""
        return self.chosen, self.rejected


def read_pairs(source: str, width: int, height: int) -> tuple[list[Pair], list[str]]:
    """The pairs of a table, a folder or a dataset, in their order, every picture looked at once.

    Args:
        width, height: of the model's pictures, in pixels.

    Returns:
        The pairs; and lines for people, of pictures of other sizes and of rows that prefer neither.

    Raises:
        UserError: no such place; or names every pair that is none, by its file and row.
    """
    if source.startswith(DATASET):
        rows, lines = dataset_pairs(source.removeprefix(DATASET))
        pairs, more = _looked_at([row if isinstance(row, str) else Pair(*row) for row in rows], source, width, height)
        return pairs, lines + more
    path = Path(source)
    try:
        found = list(_in_folder(path) if path.is_dir() else _in_table(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    return _looked_at(found, path, width, height)


def fitted(picture: Tensor, width: int, height: int) -> Tensor:
    """A picture (3, H, W) at a size: resized until it just covers that, then cropped in the middle.

    As the released trainers do it (SalesforceAIResearch/DiffusionDPO, train.py, with ``Resize`` and ``CenterCrop``; so
    do diffusers' scripts), bilinearly and without aliasing.
    """
    if picture.shape[1:] == (height, width):
        return picture
    scale = _scale(picture, width, height)
    size = (max(height, round(picture.shape[1] * scale)), max(width, round(picture.shape[2] * scale)))
    resized = interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width].contiguous()


def seen_hash(picture: Tensor) -> str:
    """SHA-256 of a picture's colors, (3, H, W), and size: the same for another file of the same picture."""
    digest = hashlib.sha256(repr(tuple(picture.shape)).encode())
    digest.update(picture.contiguous().numpy().tobytes())
    return digest.hexdigest()


def pairs_hash(pairs: Sequence[Pair]) -> str:
    """SHA-256 of pairs: prompts, what is seen of their pictures, which is preferred, and their order."""
    told = [repr((pair.prompt.text, pair.hashes)) for pair in pairs]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _scale(picture: Tensor, width: int, height: int) -> float:
    return max(height / picture.shape[1], width / picture.shape[2])


# ---- where pairs are written


def _in_table(path: Path) -> Iterator[Pair | str]:
    """The pairs of a table, whose files are named from its own folder, and a problem for each row that is none."""
    if path.suffix not in TABLES:
        known = ", ".join(TABLES)
        told = f"the name must end in {known}" if path.exists() else "no such file or folder; check the path"
        raise UserError(f"{path}: {told}")
    for row in read_rows(path):
        rest = dict(row.prompt.metadata)
        named = {column: rest.pop(column, None) for column in (CHOSEN, REJECTED)}
        lacking = [column for column, file in named.items() if not isinstance(file, str) or not file.strip()]
        if lacking:
            yield f"{row.where}: names no picture under {' and '.join(lacking)}"
            continue
        chosen, rejected = (path.parent / str(file).strip() for file in named.values())
        yield Pair(replace(row.prompt, metadata=rest), chosen, rejected)


def _in_folder(folder: Path) -> Iterator[Pair | str]:
    """The pairs of a folder: those of its table, or of the folders in it, one a prompt."""
    tables = [folder / f"{TABLE}{ending}" for ending in TABLES if (folder / f"{TABLE}{ending}").is_file()]
    if len(tables) > 1:
        raise UserError(f"{folder}: holds {' and '.join(table.name for table in tables)}; name the one that is meant")
    if tables:
        yield from _in_table(tables[0])
        return
    inside = sorted((each for each in folder.iterdir() if each.is_dir() and each.name[0] != "."), key=natural_key)
    if not inside:
        raise UserError(
            f"{folder}: holds neither a table {TABLE}.csv (columns prompt, {CHOSEN}, {REJECTED}) nor a folder for each "
            f"prompt; docs/pairs.md says how pairs are laid out"
        )
    for each in inside:
        yield from _of_prompt(each)


def _of_prompt(folder: Path) -> Iterator[Pair | str]:
    """Each chosen picture of a prompt's folder with each rejected one."""
    written = folder / PROMPT_FILE
    try:
        text = read_text(written, encoding="utf-8-sig").strip() if written.is_file() else folder.name
    except UnicodeDecodeError:
        yield f"{written}: not UTF-8 text; save it as UTF-8"
        return
    pictures = sorted((each for each in folder.iterdir() if each.suffix.lower() in suffixes()), key=natural_key)
    chosen, rejected = (
        [each for each in pictures if each.name.lower().startswith(kind)] for kind in (CHOSEN, REJECTED)
    )
    others = [each.name for each in pictures if each not in chosen and each not in rejected]
    if not text:
        yield f"{written}: is empty; write the prompt there"
    elif len(pictures) < 2:
        count = "one picture" if pictures else "no picture"
        yield f"{folder}: has {count}; a pair needs two of its prompt"
    elif not chosen:
        yield f"{folder}: none is preferred; begin the names of the better pictures with {CHOSEN}"
    elif not rejected:
        yield f"{folder}: none is rejected; begin the names of the worse pictures with {REJECTED}"
    elif others:
        yield f"{folder}: {others[0]} is neither; begin its name with {CHOSEN} or {REJECTED}, or move it away"
    else:
        prompt = Prompt(text, place=str(folder))
        yield from (Pair(prompt, one, other) for one, other in itertools.product(chosen, rejected))


# ---- what is in their pictures


def _looked_at(
    found: Sequence[Pair | str], source: Path | str, width: int, height: int
) -> tuple[list[Pair], list[str]]:
    """Pairs with their hashes, and a line about sizes.

    Raises:
        UserError: names all problems, those that were found before too.
    """
    looks: dict[Picture, str] = {}
    sizes: dict[Picture, tuple[int, int]] = {}
    pairs, problems, places = list[Pair](), list[str](), list[str]()
    for pair in found:
        if isinstance(pair, str):
            told, place = [pair], pair.partition(": ")[0]
        else:
            place = pair.prompt.place
            told = [_look(file, place, looks, sizes, width, height) for file in pair.files]
            hashes = (looks.get(pair.chosen, ""), looks.get(pair.rejected, ""))
            if not any(told) and hashes[0] == hashes[1]:
                told.append(f"{place}: {pair.chosen.name} and {pair.rejected.name} are the same picture")
            pairs.append(replace(pair, hashes=hashes))
        wrong = [each for each in told if each]
        problems += wrong
        places += [place] * len(wrong)
    if problems:
        raise UserError(first_few(problems, "problems", others=places[MOST_PROBLEMS:]))
    if not pairs:
        raise UserError(f"{source}: holds no pair; write at least one")
    other = [file for file, size in sizes.items() if size != (width, height)]
    if not other:
        return pairs, []
    own_width, own_height = sizes[other[0]]
    first = f"first: {other[0]}, {own_width} x {own_height}"
    done = f"resized and cropped in the middle to {width} x {height}"
    return pairs, [f"{len(other)} of {len(sizes)} pictures of {source} are {done} ({first})"]


def _look(
    file: Picture,
    place: str,
    looks: dict[Picture, str],
    sizes: dict[Picture, tuple[int, int]],
    width: int,
    height: int,
) -> str:
    """What is wrong with a picture; nothing if it is right, or was looked at before and noted."""
    if file in looks:
        return ""
    looks[file] = ""
    try:
        picture = _read(file)
    except UserError as error:
        return str(error) if isinstance(file, RowPicture) else f"{place}: {error}"
    own_height, own_width = picture.shape[1:]
    sizes[file] = (own_width, own_height)
    looks[file] = seen_hash(picture)
    if _scale(picture, width, height) > LARGEST_SCALE:
        return (
            f"{place}: {file} has {own_width} x {own_height} pixels, which would be enlarged more than "
            f"{LARGEST_SCALE:g} times for {width} x {height}; take a larger one, or set model.width and model.height"
        )
    return ""


def read_fitted(file: Picture, expected: str, place: str, width: int, height: int) -> Tensor:
    """A pair's picture as the model sees it, (3, height, width) in [0, 1].

    Args:
        expected: its hash when the run began.

    Raises:
        UserError: it cannot be read any more, or is another.
    """
    picture = _read(file)
    if seen_hash(picture) != expected:
        raise UserError(f"{place}: {file} is another picture than when the run began; put it back")
    return fitted(picture, width, height)


def _read(picture: Picture) -> Tensor:
    return picture.read() if isinstance(picture, RowPicture) else read_picture(picture)


def overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[Pair]:
    """The held-out pairs that are trained on too: the same prompt and pictures, whichever is preferred."""
    known = {(pair.prompt.text, frozenset(pair.hashes)) for pair in train}
    return [pair for pair in held_out if (pair.prompt.text, frozenset(pair.hashes)) in known]


def stacked(pictures: Sequence[Tensor], width: int, height: int) -> Tensor:
    """Pictures (3, height, width) as one tensor, (N, 3, height, width), N may be 0."""
    return torch.stack(list(pictures)) if pictures else torch.zeros(0, 3, height, width)
