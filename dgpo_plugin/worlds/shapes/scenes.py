"""What the shapes world can say: six task types (GenEval's), their captions, and the train / held-out split.

A requirement is plain JSON, because it travels as a prompt's metadata::

    {"task": "position", "objects": [{"shape": "circle", "colour": "red", "count": 1},
                                     {"shape": "square", "colour": null, "count": 1}], "relation": "left of"}
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.split import held_out_keys

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
TASKS = ("single_object", "two_objects", "counting", "colours", "colour_attribution", "position")
OUT_OF_DOMAIN_TASK = "position"
"""The task type that is never trained on; all its prompts are for out-of-domain evaluation."""
HELD_OUT_FRACTION = 0.25

Requirement = dict[str, Any]
_Kinds = list[tuple[str, str | None]]
"""Each noun of a caption: its shape, and its colour or None."""


def all_prompts() -> list[Prompt]:
    """Every prompt of the world, task by task, in a fixed order (486 of them)."""
    return [Prompt(caption(requirement), requirement) for task in TASKS for requirement in _requirements(task)]


def train_prompts() -> list[Prompt]:
    """The in-domain prompts that reinforcement learning may see, 400 of them, 128 different.

    Small task types are repeated until all weigh the same, as they do in the mean accuracy: 80 of the 128 prompts
    are of one task type, and a run would hardly meet the others.
    """
    seen = [p for p in all_prompts() if p.metadata["task"] != OUT_OF_DOMAIN_TASK and not _is_held_out(p)]
    by_task = [[p for p in seen if p.metadata["task"] == task] for task in TASKS if task != OUT_OF_DOMAIN_TASK]
    size = max(len(prompts) for prompts in by_task)
    return [prompts[index % len(prompts)] for prompts in by_task for index in range(size)]


def held_out_prompts() -> list[Prompt]:
    """In-domain prompts whose scenes (whatever the order of words) are in no training prompt."""
    return [p for p in all_prompts() if p.metadata["task"] != OUT_OF_DOMAIN_TASK and _is_held_out(p)]


def out_of_domain_prompts() -> list[Prompt]:
    """Every prompt of the task type that is never trained on."""
    return [p for p in all_prompts() if p.metadata["task"] == OUT_OF_DOMAIN_TASK]


def caption(requirement: Requirement) -> str:
    """The words for a requirement: "two red circles", "a circle left of a blue square"."""
    joiner = f" {requirement['relation']} " if requirement["relation"] else " and "
    return joiner.join(_noun_phrase(item["shape"], item["colour"], item["count"]) for item in requirement["objects"])


def _noun_phrase(shape: str, color: str | None, count: int) -> str:
    noun = f"{color} {shape}" if color else shape
    return f"a {noun}" if count == 1 else f"{NUMBER_WORDS[count]} {noun}s"


def _requirements(task: str) -> list[Requirement]:
    colored_shapes: _Kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    pairs = list(itertools.permutations(SHAPES, 2))
    if task == "single_object":
        return [_requirement(task, [(shape, None)]) for shape in SHAPES]
    if task == "two_objects":
        return [_requirement(task, [(first, None), (second, None)]) for first, second in pairs]
    if task == "counting":
        kinds: _Kinds = [(shape, color) for shape in SHAPES for color in (None, *COLORS)]
        return [_requirement(task, [kind], count=count) for kind in kinds for count in NUMBER_WORDS]
    if task == "colours":
        return [_requirement(task, [kind]) for kind in colored_shapes]
    if task == "colour_attribution":
        return [_requirement(task, [a, b]) for a, b in itertools.permutations(colored_shapes, 2) if a[1] != b[1]]
    plain: list[_Kinds] = [[(first, None), (second, None)] for first, second in pairs]
    colored: list[_Kinds] = [
        [a, b] for a, b in itertools.permutations(colored_shapes, 2) if a[0] != b[0] and a[1] != b[1]
    ]
    return [_requirement(task, pair, relation=relation) for pair in plain + colored for relation in RELATIONS]


def _requirement(task: str, kinds: _Kinds, count: int = 1, relation: str | None = None) -> Requirement:
    objects = [{"shape": shape, "colour": color, "count": count} for shape, color in kinds]
    return {"task": task, "objects": objects, "relation": relation}


def _scene_key(prompt: Prompt) -> str:
    """A scene's key, equal for two captions of the same scene ("a circle and a square", "a square and a circle")."""
    objects = sorted(json.dumps(item, sort_keys=True) for item in prompt.metadata["objects"])
    return json.dumps([prompt.metadata["task"], objects])


def _held_out_scenes() -> frozenset[str]:
    keys_by_task = ([_scene_key(Prompt(caption(r), r)) for r in _requirements(task)] for task in TASKS)
    return frozenset().union(*(held_out_keys(keys, HELD_OUT_FRACTION) for keys in keys_by_task))


_HELD_OUT_SCENES = _held_out_scenes()


def _is_held_out(prompt: Prompt) -> bool:
    return _scene_key(prompt) in _HELD_OUT_SCENES
