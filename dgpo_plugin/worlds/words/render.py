"""Pictures of words: bold capitals, colored on a colored ground, plain or patterned."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dgpo_plugin.worlds.words.captions import COLORS, FONTS

WIDTH, HEIGHT = 64, 32
"""Pixels."""
PALETTE = {
    "black": (0.06, 0.06, 0.08),
    "blue": (0.12, 0.20, 0.70),
    "green": (0.05, 0.38, 0.16),
    "white": (0.96, 0.96, 0.94),
    "yellow": (0.98, 0.86, 0.30),
    "pink": (0.98, 0.68, 0.78),
}
"""RGB in [0, 1]: three dark ones, then three light ones."""
DARK = COLORS[:3]
FONT_FILES = dict(
    zip(
        FONTS,
        (
            "DejaVuSans-Bold",
            "DejaVuSerif-Bold",
            "DejaVuSansMono-Bold",
            "DejaVuSans-BoldOblique",
            "DejaVuSerif-BoldItalic",
        ),
        strict=True,
    )
)
LARGEST = 24
"""Pixels an em; a wide word is set smaller, until it fits."""
MARGIN = 3
"""Pixels free at the left and at the right, at least."""
SHIFT = 2
"""Pixels that a word may stand off the middle, at most, as far as its margin allows."""
PERIOD = 8
"""Pixels from one stripe, square or dot to the next."""
CONTRAST = 0.16
"""How much lighter a dark ground's pattern is than the ground, or darker than a light one."""


def render(metadata: Mapping[str, Any], rng: np.random.Generator) -> NDArray[np.float32]:
    """One random picture of what a prompt's metadata ask for, float32 (3, 32, 64) in [0, 1].

    The color of the letters, dark on light or light on dark, and where the word stands exactly are drawn at random.
    """
    light = metadata["color"] in DARK
    ink = np.array(PALETTE[str(rng.choice([color for color in COLORS if (color not in DARK) == light]))])
    picture = _ground(metadata["ground"], metadata["color"])
    cover = _word(metadata["text"], metadata["font"], rng)
    drawn: NDArray[np.float32] = (picture + cover * (ink[:, None, None] - picture)).astype(np.float32)
    return drawn


def _ground(kind: str, color: str) -> NDArray[np.float64]:
    """A ground (3, 32, 64), its pattern in a shade of its own color."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    half = PERIOD // 2
    marked = {
        "plain": np.zeros((HEIGHT, WIDTH), bool),
        "striped": columns % PERIOD < half,
        "checkered": (rows // half + columns // half) % 2 == 0,
        "dotted": np.hypot(rows % PERIOD - half + 0.5, columns % PERIOD - half + 0.5) < half / 2 + 0.5,
    }[kind]
    shade = CONTRAST if color in DARK else -CONTRAST
    plain = np.array(PALETTE[color])[:, None, None]
    ground: NDArray[np.float64] = np.clip(plain + shade * marked, 0, 1)
    return ground


def _word(word: str, font: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """How much of each pixel a word covers, (32, 64) in [0, 1]."""
    size = LARGEST
    while True:
        left, top, right, bottom = _font(font, size).getbbox(word)
        if right - left <= WIDTH - 2 * MARGIN:
            break
        size -= 1
    x, y = (WIDTH - (right - left)) / 2, (HEIGHT - (bottom - top)) / 2
    slack = min(SHIFT, x - 1)
    at = (x - left + rng.uniform(-slack, slack), y - top + rng.uniform(-SHIFT, SHIFT))
    canvas = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).text(at, word, fill=255, font=_font(font, size))
    return np.asarray(canvas, np.float64) / 255


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(__file__).parent / "fonts" / f"{FONT_FILES[name]}.ttf"
    # The basic layout is there in every build of Pillow, and three capitals need no other.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
