"""Prompts of GenEval's six task types, with its metadata: tag, include, exclude (arXiv 2310.11513).

The objects are the COCO classes, which its detectors know. The test set is GenEval's own, the 553 prompts that its
script draws (djghosh13/geneval, prompts/create_prompts.py, seed 43), and lies beside this file. Every other scene is
either a training or a validation scene, whatever the order of its words: objects, colours, counts and relations that
are tested together are never trained together. Task types are trained on as often as in the published list, which is
50,000 lines long; ours has scenes of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_shipped_prompts
from dgpo_plugin.prompts.split import held_out_keys, shuffled_by_hash
from dgpo_plugin.prompts.words import read_words

OBJECTS = read_words("geneval_objects.txt")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
UNCOLORED = ("person",)
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "knife": "knives",
    "broccoli": "heads of broccoli",
    "computer mouse": "computer mice",
}
PAIRED = ("skis", "scissors")
VALIDATION_SHARE = 0.15
"""Of the scenes of each task type that the test set leaves."""
TRAIN_SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
"""How often each task type is trained on: Flow-GRPO's ratio (arXiv 2505.05470), which DGPO's training list has too.

A single object is no training prompt: the base draws it. In percent: 41, 29, 18, 6, 6, 0.
"""
TRAIN_UNIT, VALIDATION_PER_TASK = 500, 60

Scene = dict[str, Any]


def train_prompts() -> list[Prompt]:
    """The training set: 8,500 prompts in the published ratio; a task with too few scenes repeats them evenly."""
    scenes = _scenes()
    return [
        prompt
        for tag, share in TRAIN_SHARES.items()
        for prompt in itertools.islice(itertools.cycle(_side(scenes[tag], held_out=False)), share * TRAIN_UNIT)
    ]


def validation_prompts() -> list[Prompt]:
    """The set for choosing settings: up to 60 of each task type, of scenes that are neither trained on nor tested.

    A single object is none of them: all 80 are tested.
    """
    return [prompt for scenes in _scenes().values() for prompt in _side(scenes, held_out=True)[:VALIDATION_PER_TASK]]


@functools.cache
def _official() -> tuple[Prompt, ...]:
    return tuple(read_shipped_prompts("lists/geneval/evaluation_metadata.jsonl"))


def official_prompts() -> list[Prompt]:
    """The test set: GenEval's own 553 prompts, in its own spelling of plurals."""
    return list(_official())


def _side(scenes: list[Scene], *, held_out: bool) -> list[Prompt]:
    """The prompts of a task type's untested scenes on one side, shuffled by their words."""
    validation = held_out_keys([_key(scene) for scene in scenes], VALIDATION_SHARE)
    side = [scene for scene in scenes if (_key(scene) in validation) == held_out]
    return [Prompt(caption(scene), scene) for scene in shuffled_by_hash(side, caption)]


def _scenes() -> dict[str, list[Scene]]:
    """Every scene of every task type that is not tested, as GenEval's metadata has it.

    Things that are tested together are left out in every relation.
    """
    tested = {_key(prompt.metadata) for prompt in _official()}
    return {tag: [scene for scene in scenes if _key(scene) not in tested] for tag, scenes in _all_scenes().items()}


def _all_scenes() -> dict[str, list[Scene]]:
    pairs = list(itertools.permutations(OBJECTS, 2))
    colored = [name for name in OBJECTS if name not in UNCOLORED]
    color_pairs = [
        (a, b, one, other)
        for n, (a, b) in enumerate(pair for pair in pairs if not {*pair} & {*UNCOLORED})
        for one, other in [_color_pair(n)]
    ]
    return {
        "single_object": [_scene("single_object", [_object(name)]) for name in OBJECTS],
        "two_object": [_scene("two_object", [_object(a), _object(b)]) for a, b in pairs],
        "counting": [
            {**_scene("counting", [_object(name, count=n)]), "exclude": [{"class": name, "count": n + 1}]}
            for name in OBJECTS
            for n in NUMBERS
        ],
        "colors": [_scene("colors", [_object(name, color=color)]) for name in colored for color in COLORS],
        "position": [
            # "a below b" is about a, which is the second that is looked for.
            _scene("position", [_object(b), _object(a, position=[RELATIONS[n % len(RELATIONS)], 0])])
            for n, (a, b) in enumerate(pairs)
        ],
        "color_attr": [
            _scene("color_attr", [_object(a, color=one), _object(b, color=other)]) for a, b, one, other in color_pairs
        ],
    }


def _color_pair(number: int) -> tuple[str, str]:
    pairs = list(itertools.permutations(COLORS, 2))
    return pairs[(7 * number) % len(pairs)]


def _object(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _scene(tag: str, include: list[dict[str, Any]]) -> Scene:
    return {"tag": tag, "include": include}


def caption(scene: Scene) -> str:
    """The words for a scene: "a photo of two benches", "a photo of a dog right of a teddy bear"."""
    items = scene["include"]
    if scene["tag"] == "position":
        looked_for, subject = items
        return f"a photo of {_words(subject)} {subject['position'][0]} {_words(looked_for)}"
    return "a photo of " + " and ".join(_words(item) for item in items)


def _words(item: dict[str, Any]) -> str:
    name, count = item["class"], item["count"]
    if count > 1:
        return f"{NUMBERS[count]} {plural(name)}"
    described = f"{item['color']} {name}" if "color" in item else name
    if name in PAIRED:
        described = f"{item['color']} pair of {name}" if "color" in item else f"pair of {name}"
    return f"{'an' if described[0] in 'aeiou' else 'a'} {described}"


def plural(name: str) -> str:
    """The plural of an object's name."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def _key(scene: Mapping[str, Any]) -> str:
    """A scene's key: what it holds, whatever the order and the relation."""
    return "|".join(sorted(f"{item['class']} {item['count']} {item.get('color')}" for item in scene["include"]))
