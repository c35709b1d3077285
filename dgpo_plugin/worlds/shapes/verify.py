"""Read a picture back and judge it against its requirement, by rules, the way GenEval does with a detector.

A pixel belongs to the palette colour whose direction from the background it shares; a thing is a connected
component of one colour; it is a circle, a square or another figure if it overlaps that figure, fitted to its
bounding box, with an intersection over union of at least ``MIN_IOU``, and is neither a fragment nor a blur; its size
is told by its longer side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dgpo_plugin.worlds.shapes.render import BACKGROUND, CROSS_ARM, RING_HOLE, VOCABULARY, Vocabulary
from dgpo_plugin.worlds.shapes.scenes import Requirement

MIN_AREA = 12
"""Smaller components (pixels) are specks, not things."""
MIN_IOU = 0.82
MAX_ASPECT = 1.35
"""Longer over shorter side of the bounding box, for a thing that may be named."""
MIN_SOLIDITY = 0.75
"""Mean coverage of a thing's pixels: 0.89 and up as drawn, below this once blurred by 4 pixels (any blob is round)."""
MIN_COSINE = 0.93
"""Below this a coloured pixel is of no palette colour."""
MIN_COVERAGE = 0.5
"""A pixel is foreground from half of the full colour on."""
MIN_OFFSET = 8.0
"""Pixels between two centres along an axis for one to be left of / above the other."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Detection:
    """One thing found in a picture.

    Attributes:
        shape, color: a name each, or ``unknown``.
        x, y: the centre of its bounding box, in pixels.
        area: in pixels.
        size: a word, or "" in a world without words for sizes.
    """

    shape: str
    color: str
    x: float
    y: float
    area: int
    size: str = ""


@dataclass(frozen=True)
class Verdict:
    """How well a picture meets its requirement.

    Attributes:
        strict: exactly what was required is there, and nothing else.
        partial: the share of it that is there, in [0, 1].
    """

    strict: bool
    partial: float


def detect(images: NDArray[np.float32], vocabulary: Vocabulary = VOCABULARY) -> list[list[Detection]]:
    """Find the things in each picture.

    Args:
        images: float (N, 3, H, W) in [0, 1].
    """
    count, _, height, width = images.shape
    masks, coverage = _color_masks(images, vocabulary)
    in_plane = np.zeros((3, 3, 3), dtype=int)
    in_plane[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    labels, found = ndimage.label(masks.reshape(-1, height, width), structure=in_plane)
    detections: list[list[Detection]] = [[] for _ in range(count)]
    if not found:
        return detections
    plane, row, column = np.nonzero(labels)
    label = labels[plane, row, column] - 1
    area = np.bincount(label, minlength=found)
    boxes = ndimage.find_objects(labels)
    low_row, high_row = (np.array([getattr(box[1], side) for box in boxes], dtype=float) for side in ("start", "stop"))
    low_column, high_column = (
        np.array([getattr(box[2], side) for box in boxes], dtype=float) for side in ("start", "stop")
    )
    owner = np.array([box[0].start for box in boxes])
    x, y = (low_column + high_column) / 2, (low_row + high_row) / 2
    half_width, half_height = (high_column - low_column) / 2, (high_row - low_row) / 2
    u = (column + 0.5 - x[label]) / half_width[label]
    v = (row + 0.5 - y[label]) / half_height[label]
    ious = np.stack([_iou(shape, u, v, label, area, 4 * half_width * half_height) for shape in vocabulary.figures])
    aspect = np.maximum(half_width, half_height) / np.minimum(half_width, half_height)
    side = 2 * np.maximum(half_width, half_height)
    colors = (*vocabulary.colors, UNKNOWN)
    least_sides = [size.least_side for size in vocabulary.sizes.values()]
    solidity = np.bincount(label, coverage[plane // len(colors), row, column], minlength=found) / area
    named = (ious.max(0) >= MIN_IOU) & (aspect <= MAX_ASPECT) & (side >= least_sides[0]) & (solidity >= MIN_SOLIDITY)
    best = ious.argmax(0)
    words = tuple(vocabulary.sizes)
    size = np.maximum(np.searchsorted(least_sides, side, side="right") - 1, 0)
    for index in np.nonzero(area >= MIN_AREA)[0]:
        shape = vocabulary.figures[best[index]] if named[index] else UNKNOWN
        picture, color = divmod(int(owner[index]), len(colors))
        place, pixels = (float(x[index]), float(y[index])), int(area[index])
        detections[picture].append(Detection(shape, colors[color], *place, pixels, words[size[index]]))
    return detections


def _color_masks(images: NDArray[np.float32], vocabulary: Vocabulary) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which pixels are of which colour, and how much of it they have.

    Returns:
        (N, colours + 1, H, W), the last plane for no palette colour; and coverage (N, H, W), 0 background, 1 full.
    """
    offset = images - BACKGROUND[:, None, None]
    directions = np.stack([full - BACKGROUND for full in vocabulary.palette.values()])
    lengths = np.linalg.norm(directions, axis=1)
    along = np.einsum("kc,nchw->nkhw", directions / lengths[:, None], offset)
    norm = np.linalg.norm(offset, axis=1)
    best = along.argmax(1)
    highest = along.max(1)
    pure = highest >= MIN_COSINE * norm
    coverage: NDArray[np.float32] = np.where(pure, highest / lengths[best], norm / lengths.min())
    foreground = coverage >= MIN_COVERAGE
    plane = np.where(pure, best, len(directions))
    planes: NDArray[np.bool_] = (plane[:, None] == np.arange(len(directions) + 1)[:, None, None]) & foreground[:, None]
    return planes, coverage


def _iou(
    shape: str,
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    label: NDArray[np.int64],
    area: NDArray[np.int64],
    box_area: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Each component's intersection over union with the figure inscribed in its bounding box, (components,).

    Args:
        u, v: the foreground pixels' places in their components' boxes, (pixels,) in [-1, 1].
        label: each pixel's component, (pixels,).
        area, box_area: in pixels, (components,).
    """
    if shape == "circle":
        inside, share = u**2 + v**2 <= 1, np.pi / 4
    elif shape == "square":
        inside, share = np.ones_like(u, dtype=bool), 1.0
    elif shape == "triangle":
        inside, share = 2 * np.abs(u) <= v + 1, 0.5
    elif shape == "cross":
        inside, share = np.minimum(np.abs(u), np.abs(v)) <= CROSS_ARM, 1 - (1 - CROSS_ARM) ** 2
    else:  # ring
        distance = u**2 + v**2
        inside, share = (distance <= 1) & (distance >= RING_HOLE**2), np.pi / 4 * (1 - RING_HOLE**2)
    overlap = np.bincount(label[inside], minlength=len(area))
    iou: NDArray[np.float64] = overlap / (area + share * box_area - overlap)
    return iou


def judge(found: Sequence[Detection], requirement: Requirement) -> Verdict:
    """Compare what was found with what was asked for.

    Partial credit is the best one-to-one assignment of found to required things (in equal parts for the shape, and
    for the colour and the size where one is asked for), over the larger of the two counts, so that a missing and a
    superfluous thing cost the same. A relation counts as one more thing, and only between things of the right shape.
    """
    wanted = [item for item in requirement["objects"] for _ in range(item["count"])]
    size = max(len(wanted), len(found))
    scores = np.array([[_match(detection, item) for detection in found] for item in wanted]).reshape(
        len(wanted), len(found)
    )
    rows, columns = linear_sum_assignment(scores, maximize=True)
    credit = float(scores[rows, columns].sum())
    if requirement["relation"]:
        size += 1
        # Equally good assignments may differ in the relation: the best counts, whatever the order of ``found``.
        first, second = (
            [i for i, detection in enumerate(found) if detection.shape == item["shape"]] for item in wanted
        )
        related = [
            float(scores[0, i] + scores[1, j]) + 1
            for i, j in itertools.product(first, second)
            if i != j and _holds(requirement["relation"], found[i], found[j])
        ]
        credit = max([credit, *related])
    partial = credit / size
    return Verdict(strict=partial > 1 - 1e-9, partial=partial)


def _match(detection: Detection, item: Requirement) -> float:
    right = [bool(detection.shape == item["shape"])]
    if item.get("size"):
        right.append(bool(detection.size == item["size"] and detection.shape != UNKNOWN))
    if item["colour"] is None:
        # A thing of no palette colour is not a clean "circle" either.
        return float(sum(right) / len(right)) * (1 if detection.color != UNKNOWN else 0.5)
    right.append(bool(detection.color == item["colour"]))
    return sum(right) / len(right)


def _holds(relation: str, a: Detection, b: Detection) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    offset = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return bool(offset >= MIN_OFFSET)


def verify(
    images: NDArray[np.float32], requirements: Sequence[Requirement], vocabulary: Vocabulary = VOCABULARY
) -> list[Verdict]:
    """One verdict for each picture of (N, 3, 64, 64), float in [0, 1], and its requirement."""
    return [judge(found, wanted) for found, wanted in zip(detect(images, vocabulary), requirements, strict=True)]
