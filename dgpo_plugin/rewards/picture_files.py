"""Pictures on disk and what rewards think of them: ``dgpo score``."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import told
from dgpo_plugin.rewards.base import Reward, RewardSet, checked_rewards

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 50_000_000
"""Of one picture: a file of kilobytes can declare more than there is memory."""


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files as given, folders' pictures by name.

    Raises:
        UserError: nothing there.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside or not path.exists():
            raise UserError(f"{path}: {'holds no picture' if path.is_dir() else 'no such file'}; check the path")
        found += inside
    return found


def read_picture(path: Path) -> Tensor:
    """A picture (3, H, W) in [0, 1], as people see it: turned as its camera says, what is transparent on white.

    Raises:
        UserError: not a picture, too large a one, or one of numbers that mean no color.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                size = f"{opened.width} x {opened.height}"
                raise UserError(
                    f"{path}: {size} pixels are more than the {MOST_PIXELS:,} that are read; make it smaller"
                )
            pixels = _values(ImageOps.exif_transpose(opened), path)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: more than the {MOST_PIXELS:,} pixels that are read; make it smaller") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a picture that can be read; remove or mend it") from error
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _values(picture: Image.Image, path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A picture's values, (H, W, 3) in [0, 1]."""
    if picture.mode.startswith("I"):  # grey in 16 bits: Pillow's own conversion would cut it off at 255
        return _gray(np.asarray(picture, dtype=np.float32) / np.float32(65535), path)
    if picture.mode == "F":
        return _gray(np.asarray(picture, dtype=np.float32), path)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255)


def _gray(values: np.ndarray[Any, np.dtype[np.float32]], path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise UserError(f"{path}: its numbers are not those of 16-bit grey, or of [0, 1]; convert it to 8 bits")
    return np.repeat(values[:, :, None], 3, axis=2)


def score(
    pictures: Sequence[Path],
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    batch_size: int,
    advance: Callable[[int], object],
) -> list[dict[str, str | float]]:
    """One row per picture: file, prompt, and a column for each reward.

    Args:
        batch_size: pictures in memory at once; those of one size that follow each other are scored together.
        advance: called with how many more are done.
    """
    rows: list[dict[str, str | float]] = []
    for start in range(0, len(pictures), batch_size):
        files = pictures[start : start + batch_size]
        tensors = [read_picture(file) for file in files]
        done = 0
        for _, run in itertools.groupby(tensors, key=lambda tensor: tensor.shape):
            images = torch.stack(list(run))
            shown = prompts[start + done : start + done + len(images)]
            columns = {
                label: _scores(member.reward, images, shown, label, files[done])
                for label, member in rewards.members.items()
            }
            for row, prompt in enumerate(shown):
                values = {name: column[row].item() for name, column in columns.items()}
                rows.append({"file": str(files[done + row]), "prompt": prompt.text, **values})
            done += len(images)
            advance(len(images))
    return rows


def _scores(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str, first: Path) -> Tensor:
    """One reward's scores (N,) of pictures, the first of which is a file that the message of an error can name."""
    try:
        return checked_rewards(reward, images, prompts, name)
    except (UserError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's reward raises
        raise UserError(f"reward {name}: {told(error)}, at {first}") from error


def as_text(rows: Sequence[dict[str, str | float]], kind: str) -> str:
    """The rows as a file's text; ``kind`` is ``csv`` or ``json``."""
    if kind == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
