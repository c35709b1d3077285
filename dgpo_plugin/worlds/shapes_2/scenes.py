"""What the second version of the shapes world can say: eight task types, their captions, and how they are split.

A requirement is version 1's (:mod:`dgpo_plugin.worlds.shapes.scenes`), where each object may have a ``size``, too::

    {"task": "size_attribution", "objects": [{"shape": "ring", "colour": "red", "count": 1, "size": "small"},
                                             {"shape": "cross", "colour": "blue", "count": 1, "size": "large"}],
     "relation": null}
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.overlap import scene_key
from dgpo_plugin.prompts.split import shuffled_by_hash, split_keys
from dgpo_plugin.worlds.shapes.render import PALETTE, Size, Vocabulary
from dgpo_plugin.worlds.shapes.scenes import NUMBER_WORDS, RELATIONS, Requirement

VOCABULARY = Vocabulary(
    figures=("circle", "square", "triangle", "cross", "ring"),
    palette={
        **PALETTE,
        "purple": np.array([0.82, 0.18, 0.90], dtype=np.float32),
        "cyan": np.array([0.10, 0.80, 0.75], dtype=np.float32),
    },
    sizes={"small": Size((7.0, 7.75), least_side=12), "large": Size((9.75, 10.75), least_side=17)},
)
"""Half a large triangle is a triangle of at most 11 pixels, which is no thing; small things have 12 to 16."""
TASKS = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "sizes",
    "color_attribution",
    "size_attribution",
    "position",
)
HEADLINE = ("counting", "color_attribution", "size_attribution")
"""The task types with at least 60 held-out prompts, whose mean accuracy is the world's headline."""
OUT_OF_DOMAIN_TASK = "position"
"""The task type that is never trained on; a sample of its prompts is for out-of-domain evaluation."""
HELD_OUT_SHARE, VALIDATION_SHARE = 0.25, 0.15
"""Of each task type's scenes."""
MOST_HELD_OUT, MOST_VALIDATION, MOST_OUT_OF_DOMAIN = 96, 48, 240
"""Prompts of one task type."""
TRAIN_FEW, TRAIN_MANY = 60, 240
"""Prompts of a task type in the training set: outside the headline, and in it."""

Kind = tuple[str | None, str | None, str]
"""A noun of a caption: its size or None, its color or None, its figure."""


@functools.cache
def all_prompts() -> tuple[Prompt, ...]:
    """Every prompt of the world, task by task, in a fixed order (7,194 of them)."""
    return tuple(Prompt(caption(wanted), wanted) for task in TASKS for wanted in _requirements(task))


def train_prompts() -> list[Prompt]:
    """The prompts that reinforcement learning may see: 240 of each of the headline's task types, 60 of the others.

    Task types with fewer prompts than that repeat them evenly.
    """
    chosen = []
    for task, (train, _, _) in _sides().items():
        size = TRAIN_MANY if task in HEADLINE else TRAIN_FEW
        chosen += [train[index % len(train)] for index in range(size)]
    return chosen


def held_out_prompts() -> list[Prompt]:
    """The test set: prompts whose scenes are in no other set, one prompt a scene, at most 96 of a task type."""
    return [prompt for _, held_out, _ in _sides().values() for prompt in held_out]


def validation_prompts() -> list[Prompt]:
    """The set for choosing settings, guidance and checkpoints, disjoint by scene from the others."""
    return [prompt for _, _, validation in _sides().values() for prompt in validation]


def out_of_domain_prompts() -> list[Prompt]:
    """240 prompts of the task type that is never trained on, one a scene."""
    return _position_prompts()[:MOST_OUT_OF_DOMAIN]


def other_position_prompts() -> list[Prompt]:
    """As many prompts of that task type as validation has of others, of scenes that are not tested."""
    return _position_prompts()[MOST_OUT_OF_DOMAIN:][:MOST_VALIDATION]


def caption(requirement: Requirement) -> str:
    """The words for a requirement: "two small red circles", "a ring left of a blue cross"."""
    joiner = f" {requirement['relation']} " if requirement["relation"] else " and "
    return joiner.join(_noun_phrase(item) for item in requirement["objects"])


def _noun_phrase(item: dict[str, Any]) -> str:
    noun = " ".join(word for word in (item.get("size"), item["colour"], item["shape"]) if word)
    plural = "es" if noun.endswith("s") else "s"
    return f"a {noun}" if item["count"] == 1 else f"{NUMBER_WORDS[item['count']]} {noun}{plural}"


@functools.cache
def _sides() -> dict[str, tuple[list[Prompt], list[Prompt], list[Prompt]]]:
    """Train, held-out and validation prompts of each in-domain task type."""
    sides = {}
    for task in TASKS:
        if task == OUT_OF_DOMAIN_TASK:
            continue
        prompts = _shuffled(task)
        held_out, validation = split_keys(map(_key, prompts), HELD_OUT_SHARE, VALIDATION_SHARE)
        sides[task] = (
            [prompt for prompt in prompts if _key(prompt) not in held_out | validation],
            _one_a_scene(p for p in prompts if _key(p) in held_out)[:MOST_HELD_OUT],
            _one_a_scene(p for p in prompts if _key(p) in validation)[:MOST_VALIDATION],
        )
    return sides


@functools.cache
def _position_prompts() -> list[Prompt]:
    return _one_a_scene(_shuffled(OUT_OF_DOMAIN_TASK))


def _shuffled(task: str) -> list[Prompt]:
    prompts = [prompt for prompt in all_prompts() if prompt.metadata["task"] == task]
    return shuffled_by_hash(prompts, lambda prompt: prompt.text)


def _one_a_scene(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each scene."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(_key(prompt), prompt)
    return list(first.values())


def _key(prompt: Prompt) -> str:
    return repr(scene_key(prompt.metadata))


def _requirements(task: str) -> Iterator[Requirement]:
    figures, colors, sizes = VOCABULARY.figures, VOCABULARY.colors, tuple(VOCABULARY.sizes)
    plain: list[Kind] = [(None, None, figure) for figure in figures]
    colored: list[Kind] = [(None, color, figure) for figure in figures for color in colors]
    sized: list[Kind] = [(size, color, figure) for figure in figures for size in sizes for color in (None, *colors)]
    if task == "single_object":
        yield from (_requirement(task, kind) for kind in plain)
    elif task == "two_objects":
        yield from (_requirement(task, *pair) for pair in itertools.permutations(plain, 2))
    elif task == "counting":
        kinds = [*plain, *colored, *sized]
        yield from (_requirement(task, kind, count=count) for kind in kinds for count in NUMBER_WORDS)
    elif task == "colors":
        yield from (_requirement(task, kind) for kind in colored)
    elif task == "sizes":
        yield from (_requirement(task, kind) for kind in sized)
    elif task == "color_attribution":
        yield from (_requirement(task, a, b) for a, b in itertools.permutations(colored, 2) if a[1] != b[1])
    elif task == "size_attribution":
        pairs = (pair for pair in itertools.permutations(sized, 2) if _differ(*pair))
        yield from (_requirement(task, a, b) for a, b in pairs)
    else:
        pairs = (pair for kinds in (plain, colored) for pair in itertools.permutations(kinds, 2) if _apart(*pair))
        yield from (_requirement(task, a, b, relation=relation) for a, b in pairs for relation in RELATIONS)


def _differ(a: Kind, b: Kind) -> bool:
    """Whether two kinds are told apart by their sizes and their figures, and both have a color or none has."""
    return a[0] != b[0] and _apart(a, b)


def _apart(a: Kind, b: Kind) -> bool:
    """Whether two kinds have different figures, and different colors or none."""
    return a[2] != b[2] and (a[1] != b[1] if a[1] and b[1] else a[1] == b[1])


def _requirement(task: str, *kinds: Kind, count: int = 1, relation: str | None = None) -> Requirement:
    objects = [
        {"shape": figure, "colour": color, "count": count, **({"size": size} if size else {})}
        for size, color, figure in kinds
    ]
    return {"task": task, "objects": objects, "relation": relation}
