"""Pictures of scenes that satisfy a requirement: flat, anti-aliased shapes on a dark ground.

What there is to draw, a :class:`Vocabulary`, is what the two versions of the world differ in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.worlds.shapes.scenes import SHAPES, Requirement

SIZE = 64
"""Pixels a side."""
BACKGROUND = np.array([0.07, 0.07, 0.09], dtype=np.float32)
PALETTE = {
    "red": np.array([0.90, 0.16, 0.18], dtype=np.float32),
    "green": np.array([0.15, 0.72, 0.28], dtype=np.float32),
    "blue": np.array([0.20, 0.38, 0.95], dtype=np.float32),
    "yellow": np.array([0.96, 0.83, 0.16], dtype=np.float32),
}
"""RGB in [0, 1]."""
GAP = 3.0
"""Least free space between two bounding boxes and at the picture's edge, in pixels."""
CROSS_ARM, RING_HOLE = 0.4, 0.5
"""Half the width of a cross's arms and the radius of a ring's hole, as shares of the figure's radius."""


@dataclass(frozen=True)
class Size:
    """How large a thing of one size is.

    Attributes:
        radii: the range of half its bounding box's side, in pixels.
        least_side: pixels of the longer side from which on it is read back as this size and no smaller one.
    """

    radii: tuple[float, float]
    least_side: float


@dataclass(frozen=True)
class Vocabulary:
    """What a version of the world can draw, and what its verifier can tell apart.

    Attributes:
        figures: names of figures, of those in :func:`_coverage`.
        palette: RGB in [0, 1] by the color's name.
        sizes: by their words, from small to large; the one size of a world without such words is under "".
    """

    figures: tuple[str, ...]
    palette: Mapping[str, NDArray[np.float32]]
    sizes: Mapping[str, Size]

    @property
    def colors(self) -> tuple[str, ...]:
        return tuple(self.palette)


VOCABULARY = Vocabulary(SHAPES, PALETTE, {"": Size((7.0, 9.5), least_side=11)})
"""Version 1's. Read from 11 pixels on: things are drawn 13 and up, and the top half of a triangle is one again."""


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def layout(
    requirement: Requirement, rng: np.random.Generator, vocabulary: Vocabulary = VOCABULARY
) -> list[SceneObject]:
    """Place the required objects at random, without overlap; what the caption leaves open is drawn at random."""
    words = tuple(vocabulary.sizes)
    kinds = [
        (item["shape"], item["colour"] or str(rng.choice(vocabulary.colors)), item.get("size"))
        for item in requirement["objects"]
        for _ in range(item["count"])
    ]
    while True:
        objects: list[SceneObject] = []
        for shape, color, size in kinds:
            if size is None:
                size = str(rng.choice(words)) if len(words) > 1 else words[0]
            radius = float(rng.uniform(*vocabulary.sizes[size].radii))
            x, y = rng.uniform(radius + GAP, SIZE - radius - GAP, size=2)
            objects.append(SceneObject(shape, color, float(x), float(y), radius))
        apart = all(_apart(a, b) for i, a in enumerate(objects) for b in objects[:i])
        if apart and (not requirement["relation"] or _clearly(requirement["relation"], *objects)):
            return objects


def _apart(a: SceneObject, b: SceneObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def _clearly(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether a relation holds along its axis and that axis is the larger distance, so no other word fits better."""
    dx, dy = b.x - a.x, b.y - a.y
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx > 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy > 0) == (relation == "above")


def draw(objects: list[SceneObject], vocabulary: Vocabulary = VOCABULARY) -> NDArray[np.float32]:
    """Draw objects into a picture, float32 (3, 64, 64) in [0, 1], later ones over earlier ones."""
    picture = np.broadcast_to(BACKGROUND[:, None, None], (3, SIZE, SIZE)).copy()
    for drawn in objects:
        cover = _coverage(drawn)
        picture += cover * (vocabulary.palette[drawn.color][:, None, None] - picture)
    return picture


def _coverage(drawn: SceneObject) -> NDArray[np.float32]:
    """How much of each pixel an object covers, in [0, 1], from the distance to its outline (one pixel wide edge)."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    u, v, r = columns - drawn.x, rows - drawn.y, drawn.radius
    if drawn.shape == "circle":
        distance = np.hypot(u, v) - r
    elif drawn.shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - r
    elif drawn.shape == "triangle":  # apex (0, -r), base from (-r, r) to (r, r)
        distance = np.maximum((2 * np.abs(u) - v - r) / np.sqrt(5.0), v - r)
    elif drawn.shape == "cross":  # of two bars as long as the box
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        distance = np.maximum(narrow - CROSS_ARM * r, wide - r)
    elif drawn.shape == "ring":
        distance = np.maximum(np.hypot(u, v) - r, RING_HOLE * r - np.hypot(u, v))
    else:
        raise ValueError(f"unknown shape {drawn.shape!r}")
    cover: NDArray[np.float32] = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return cover


def render(
    requirement: Requirement, rng: np.random.Generator, vocabulary: Vocabulary = VOCABULARY
) -> NDArray[np.float32]:
    """One random picture of the requirement, float32 (3, 64, 64) in [0, 1]."""
    return draw(layout(requirement, rng, vocabulary), vocabulary)
