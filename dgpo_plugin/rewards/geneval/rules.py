"""GenEval's rules: what was asked for, what was found, and what that is worth. No model here.

Sources: GenEval (arXiv 2310.11513, and djghosh13/geneval, ``evaluate_images.py``) for the six task types, the
thresholds, the relations and :func:`strict`; Flow-GRPO (arXiv 2505.05470, and its reward server
yifan123/reward-server, ``gen_eval.py``) for :func:`partial`.

A prompt's metadata is GenEval's own::

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}]}

that is a cat left of the thing that ``include`` names first, number 0. ``exclude`` has classes and counts that would be
too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dgpo_plugin.common.errors import UserError, did_you_mean, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.geneval import COLORS, OBJECTS, RELATIONS

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD = 0.3
"""Detections that are surer than this count; of a counting prompt those surer than ``COUNTING_THRESHOLD``."""
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16
"""Of a class; the surest."""
MARGIN = 0.1
"""Share of both boxes' size that an offset must exceed before it makes a relation."""


@dataclass(frozen=True)
class Detection:
    """One object in a picture.

    Attributes:
        name: its class, in GenEval's spelling.
        score: how sure, in [0, 1].
        box: left, top, right, bottom in pixels; right and bottom are past the object's last pixel.
        mask: bool (H, W), the object's pixels; None if the detector gives boxes alone.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


Found = Mapping[str, Sequence[Detection]]
"""Detections by class, the surest first."""
Colors = Callable[[Sequence[Detection]], Sequence[str]]
"""The color of each of several objects of one class."""


@dataclass(frozen=True)
class Wanted:
    """``count`` objects of a class, all of one color, all in a relation to all of the ``target``-th wanted."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """A prompt's metadata, checked. ``exclude``: from how many objects of a class on there are too many."""

    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


def read_task(prompt: Prompt) -> Task:
    """What a prompt asks for.

    Raises:
        UserError: no metadata of GenEval's form, or a class, color or relation that it does not know.
    """
    tag, include = prompt.metadata.get("tag"), prompt.metadata.get("include")
    if tag is None or not include:
        raise UserError(
            f"prompt {prompt.text!r} has no GenEval metadata (tag, include); take its prompts from geneval/train"
        )
    with prefixed(f"prompt {prompt.text!r}"):
        if tag not in TAGS:
            raise UserError(f"tag {tag!r} is no task type{did_you_mean(str(tag), TAGS)}")
        exclude = prompt.metadata.get("exclude", [])
        if not isinstance(include, list) or not isinstance(exclude, list):
            raise UserError("include and exclude must be lists")
        return Task(
            tag,
            tuple(_wanted(item, number) for number, item in enumerate(include)),
            tuple(_wanted(item, number) for number, item in enumerate(exclude)),
        )


def _wanted(item: Any, number: int) -> Wanted:
    if not isinstance(item, Mapping) or not isinstance(item.get("class"), str):
        raise UserError(f"{item!r} names no class")
    name, count, color = item["class"], item.get("count"), item.get("color")
    if name not in OBJECTS:
        raise UserError(f"class {name!r} is not one of COCO's 80{_near(name, OBJECTS)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{name} needs a count of at least 1 (given {count!r})")
    if color is not None and color not in COLORS:
        raise UserError(f"no color {color!r}{did_you_mean(str(color), COLORS)}")
    position = item.get("position")
    if position is None:
        return Wanted(name, count, color)
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise UserError(f"position {position!r} must be one of {', '.join(RELATIONS)} and a number")
    if not isinstance(position[1], int) or not 0 <= position[1] < number:
        raise UserError(f"position {position!r} must point to one that include names before {name}")
    return Wanted(name, count, color, position[0], position[1])


def _near(name: str, known: Sequence[str]) -> str:
    """The near name, but not all 80."""
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else ""


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class: above the task type's threshold, the surest first, at most 16 a class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: (-d.score, d.box)):
        group = found.setdefault(detection.name, []) if detection.score > threshold else []
        if len(group) < MOST_OBJECTS:
            group.append(detection)
    return found


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is, as seen from b: none, one or two of the four relations.

    For the offset o = centre(a) - centre(b), along each axis i: r_i = sign(o_i) * max(|o_i| - 0.1 (size_i(a) +
    size_i(b)), 0); a relation holds where r_i / |o| is beyond half: left of (x < -1/2), right of (x > 1/2), above
    (y < -1/2), below (y > 1/2). None holds if r is 0 (less than a thousandth of a pixel) along both axes.
    """
    corners = np.array([a.box, b.box], dtype=np.float64).reshape(2, 2, 2)  # object, corner, axis
    centres, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * sizes.sum(0), 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def strict(task: Task, found: Found, colors: Colors) -> float:
    """GenEval's own verdict, 1 or 0: everything asked for is there, and nothing in excess.

    Of each class the ``count`` surest are looked at, and there must be so many; all must have the color, and stand in
    the relation to all objects of the target, which must have passed itself. More of a class than ``count`` are no
    mistake, but from an excluded count on they are: GenEval excludes count + 1 in its counting prompts. What
    Flow-GRPO's server calls strict is another rule: exact counts everywhere.
    """
    passed: list[Sequence[Detection]] = []
    for wanted in task.include:
        objects = found.get(wanted.name, [])[: wanted.count]
        if len(objects) < wanted.count:
            return 0.0
        if wanted.color is not None and list(colors(objects)).count(wanted.color) < wanted.count:
            return 0.0
        if wanted.relation is not None and not _related(objects, wanted.relation, passed[wanted.target]):
            return 0.0
        passed.append(objects)
    return float(all(len(found.get(wanted.name, [])) < wanted.count for wanted in task.exclude))


def partial(task: Task, found: Found, colors: Colors) -> float:
    """Flow-GRPO's training reward: the mean of these credits, over all that ``include`` names; 1 is all right.

    - the count n of a class that n_ref were asked for of: 1 - |n - n_ref| / n_ref;
    - its color, if asked for: 0 if n is not n_ref, else 1 - |k - n_ref| / n_ref with k of that color;
    - its relation, if asked for: 0 if n is not n_ref or the target has not passed (its own count, color and relation);
      1 if it holds between all of both; and 0 *and* 1 (two credits) if it does not.

    The last rule is the published server's: two objects in the wrong place are worth 3/4 and not 2/3. It is kept, so
    that numbers can be compared. ``exclude`` plays no part. With 16 objects where one was asked for, a credit is -14.
    """
    credits: list[float] = []
    passed: list[Sequence[Detection] | None] = []
    for wanted in task.include:
        objects, right = found.get(wanted.name, []), True
        credits.append(_closeness(len(objects), wanted.count))
        if len(objects) != wanted.count:
            right = False
            if wanted.color is not None or wanted.relation is not None:
                credits.append(0.0)
        elif wanted.color is not None:
            colored = list(colors(objects)).count(wanted.color)
            credits.append(_closeness(colored, wanted.count))
            right = colored == wanted.count
        if right and wanted.relation is not None:
            target = passed[wanted.target]
            right = target is not None and _related(objects, wanted.relation, target)
            credits += [1.0] if right else [0.0] if target is None else [0.0, 1.0]
        passed.append(objects if right else None)
    return float(np.mean(credits))


def _closeness(count: int, wanted: int) -> float:
    return 1 - abs(count - wanted) / wanted


def _related(objects: Sequence[Detection], relation: str, targets: Sequence[Detection]) -> bool:
    return all(relation in relations(a, b) for a in objects for b in targets)
