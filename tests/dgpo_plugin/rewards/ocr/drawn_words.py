"""Words drawn plainly, for tests that read them back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def dejavu(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(DEJAVU), size)  # Pillow 10.1 takes no Path


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def plainly(text: str, size: float = 48, margin: int = 20) -> Tensor:
    """Black on white, in a picture that is as large as the text and its margin."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, dejavu(size))
    image = Image.new("RGB", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin), "white")
    ImageDraw.Draw(image).multiline_text((margin - left, margin - top), text, "black", dejavu(size))
    return as_tensor(image)


def placed(width: int, height: int, size: float, *words: tuple[str, int, int]) -> Tensor:
    """Black on white, each text with its upper left corner at (x, y)."""
    image = Image.new("RGB", (width, height), "white")
    for text, x, y in words:
        ImageDraw.Draw(image).text((x, y), text, "black", dejavu(size), anchor="lt")
    return as_tensor(image)


def on_a_sign(text: str, *, size: int = 256, angle: float = 0, busy: bool = False) -> Tensor:
    """Black words in the middle, on white or over a busy picture."""
    background = np.full((size, size, 3), 255, dtype=np.uint8)
    if busy:
        rows, columns = np.mgrid[:size, :size]
        waves = 200 + 40 * np.sin(rows / 9)[..., None] * np.cos(columns / 13)[..., None] * np.array([1, 0.6, 0.2])
        background = (waves + np.random.default_rng(0).normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(background)
    layer = Image.new("L", (size, size), 0)
    font = ImageFont.load_default(size / 8)
    ImageDraw.Draw(layer).text((size / 2, size / 2), text, fill=255, font=font, anchor="mm")
    image.paste((0, 0, 0), mask=layer.rotate(angle))
    return as_tensor(image)
