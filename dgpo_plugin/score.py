"""Pictures on disk and what rewards think of them: ``dgpo score``."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dgpo_plugin.errors import UserError
from dgpo_plugin.prompts import Prompt
from dgpo_plugin.rewards import Reward, checked_rewards

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders' pictures by name.

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
    """(3, H, W) in [0, 1].

    Raises:
        UserError: not a picture.
    """
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path}: not a picture that can be read; remove or mend it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def score(
    pictures: Sequence[Path],
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    batch_size: int,
    advance: Callable[[int], object],
) -> list[dict[str, str | float]]:
    """One row a picture: file, prompt, and a column for each reward.

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
            asked = prompts[start + done : start + done + len(images)]
            columns = {name: checked_rewards(reward, images, asked, name) for name, reward in rewards.items()}
            for row, prompt in enumerate(asked):
                values = {name: column[row].item() for name, column in columns.items()}
                rows.append({"file": str(files[done + row]), "prompt": prompt.text, **values})
            done += len(images)
            advance(len(images))
    return rows


def as_text(rows: Sequence[dict[str, str | float]], kind: str) -> str:
    """``csv`` or ``json``."""
    if kind == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
