"""A captioned sheet of two batches of pictures, without and with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEAST_SIDE = 160
"""Pixels that a picture has in the grid at least, so that captions fit; small ones are enlarged."""
GAP, LINE = 8, 18
"""Pixels: between pictures, and a line of text."""


def draw_grid(
    before: Tensor, after: Tensor, scores: Sequence[Sequence[float]] | None, captions: Sequence[str], title: str
) -> Tensor:
    """A sheet (1, H, W, 3) in [0, 1] of two batches (N, h, w, C) side by side, one row per caption.

    Args:
        before, after: equally many pictures per caption, in the order of the captions.
        scores: of both batches, one number per picture, written under it; None to leave them out.
    """
    columns = len(before) // len(captions)
    enlarged = -(-LEAST_SIDE // before.shape[2])
    height, width = before.shape[1] * enlarged, before.shape[2] * enlarged
    side_width = columns * (width + GAP)
    row_height = LINE + height + LINE + GAP
    sheet = Image.new("RGB", (2 * side_width + 2 * GAP, LINE * 2 + GAP + len(captions) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    draw.text((GAP, 2), _fitted(title, draw, font, sheet.width), fill="black", font=font)
    for index, (side, label) in enumerate(((before, "without"), (after, "with the adapter"))):
        left = GAP + index * (side_width + GAP)
        draw.text((left, LINE), label, fill="dimgray", font=font)
        for n, picture in enumerate(side):
            row, column = divmod(n, columns)
            x, y = left + column * (width + GAP), 2 * LINE + row * row_height
            if column == 0 and index == 0:
                draw.text((x, y), _fitted(captions[row], draw, font, sheet.width), fill="black", font=font)
            pixels = (picture[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y + LINE))
            if scores is not None:
                worse = index == 1 and scores[1][n] < scores[0][n]
                better = index == 1 and scores[1][n] > scores[0][n]
                color = "firebrick" if worse else "darkgreen" if better else "dimgray"
                draw.text((x, y + LINE + height), f"{scores[index][n]:.3f}", fill=color, font=font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _fitted(text: str, draw: Any, font: Any, width: int) -> str:
    """A text, cut to so many pixels."""
    while len(text) > 4 and draw.textlength(text, font=font) > width - 2 * GAP:
        text = text[:-4].rstrip() + "..."
    return text
