"""Pictures on disk and what rewards think of them: ``dgpo score``."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import refuse_no_file
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import told
from dgpo_plugin.rewards.base import Reward, RewardSet, checked_rewards
from dgpo_plugin.rewards.picture_folders import formats

Scores = dict[str, str | float | None]
"""A row of the result: file, prompt and each reward's score; None where the picture could not be read."""
SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose 16-bit grey Pillow reads as whole numbers of 32 bits."""
MOST_PIXELS = 50_000_000
"""Of one picture: a file of kilobytes can declare more than there is memory."""


def read_picture(path: Path) -> Tensor:
    """A picture (3, H, W) in [0, 1], as people see it: turned as its camera says, what is transparent on white.

    Raises:
        UserError: not a picture, too large a one, or one of numbers that mean no color.
    """
    try:
        refuse_no_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    return _read(path, str(path))


def read_picture_bytes(data: bytes, where: str) -> Tensor:
    """As :func:`read_picture`, of a file's bytes, which stand somewhere that messages name.

    Raises:
        UserError: likewise.
    """
    return _read(io.BytesIO(data), where)


def _read(source: Path | io.BytesIO, where: str) -> Tensor:
    try:
        with _without_warnings(), Image.open(source, formats=formats()) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                size = f"{opened.width} x {opened.height}"
                raise UserError(
                    f"{where}: {size} pixels are more than the {MOST_PIXELS:,} that are read; make it smaller"
                )
            if opened.mode == "I" and opened.format not in SIXTEEN_BITS:
                raise UserError(f"{where}: its numbers have 32 bits; convert it to 8 bits")
            pixels = as_seen(opened, where)
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: more than the {MOST_PIXELS:,} pixels that are read; make it smaller") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers have no one class for a file that is broken
        raise UserError(f"{where}: not a picture that can be read; remove or mend it") from error
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Pillow's warnings to itself: a picture is read, or it is a line of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_seen(opened: Image.Image, where: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A picture's values, (H, W, 3) in [0, 1], as people see it: turned upright, what is transparent on white.

    Raises:
        UserError: they are numbers that mean no color.
    """
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):  # grey in 16 bits: Pillow's own conversion would cut it off at 255
        return _gray(np.asarray(picture, dtype=np.float32) / np.float32(65535), where)
    if picture.mode == "F":
        return _gray(np.asarray(picture, dtype=np.float32), where)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255)


def _gray(values: np.ndarray[Any, np.dtype[np.float32]], where: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise UserError(f"{where}: its numbers are not those of 16-bit grey, or of [0, 1]; convert it to 8 bits")
    return np.repeat(values[:, :, None], 3, axis=2)


def score(
    pictures: Sequence[Path],
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    batch_size: int,
    advance: Callable[[int], object],
) -> tuple[list[Scores], list[str]]:
    """One row per picture: file, prompt, and a column for each reward; and a line for each that cannot be read.

    Args:
        batch_size: pictures in memory at once; those of one size that follow each other are scored together.
        advance: called with how many more are done.

    Raises:
        UserError: a reward fails, or no picture can be read.
    """
    rows: list[Scores] = []
    unreadable: list[str] = []
    for start in range(0, len(pictures), batch_size):
        files, texts = pictures[start : start + batch_size], prompts[start : start + batch_size]
        batch: list[tuple[Path, Prompt, Tensor | None]] = []
        for file, prompt in zip(files, texts, strict=True):
            try:
                batch.append((file, prompt, read_picture(file)))
            except UserError as error:
                unreadable.append(str(error))
                batch.append((file, prompt, None))
        for _, run in itertools.groupby(batch, key=lambda each: None if each[2] is None else each[2].shape):
            rows += _rows(list(run), rewards)
        advance(len(batch))
    if len(unreadable) == len(pictures):
        raise UserError(unreadable[0] if len(pictures) == 1 else f"none can be read; the first: {unreadable[0]}")
    return rows, unreadable


def _rows(run: Sequence[tuple[Path, Prompt, Tensor | None]], rewards: RewardSet) -> list[Scores]:
    """Rows of pictures that all have one size, or all could not be read."""
    rows: list[Scores] = [{"file": _as_text(file), "prompt": prompt.text} for file, prompt, _ in run]
    tensors = [tensor for _, _, tensor in run if tensor is not None]
    for label, member in rewards.members.items():
        if not tensors:
            values: Sequence[float | None] = [None] * len(run)
        else:
            shown = [prompt for _, prompt, _ in run]
            values = _scores(member.reward, torch.stack(tensors), shown, label, run[0][0]).tolist()
        for row, value in zip(rows, values, strict=True):
            row[label] = value
    return rows


def _as_text(path: Path) -> str:
    """A path that any file can keep: bytes of it that are no UTF-8 are written out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _scores(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str, first: Path) -> Tensor:
    """One reward's scores (N,) of pictures, the first of which is a file that the message of an error can name."""
    try:
        return checked_rewards(reward, images, prompts, name)
    except (UserError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's reward raises
        raise UserError(f"reward {name}: {told(error)}, at {first}") from error


def as_text(rows: Sequence[Scores], kind: str) -> str:
    """The rows as a file's text; ``kind`` is ``csv`` or ``json``."""
    if kind == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
