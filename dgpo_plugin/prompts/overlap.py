"""Which prompts of two sets ask for the same, so that what is tested is not what was trained on."""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.quotes import first_quoted

MIRRORED = {"right of": "left of", "below": "above"}
"""Relations that say the same as another one from the other side: a right of b is b left of a."""


def overlapping(first: Sequence[Prompt], second: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Pairs of prompts, one of each set, that are the same by text or by what a reward judges.

    Texts are compared without case and with single spaces, the words to be rendered without case and spaces, and
    scenes (:func:`scene_key`) without the order in which they are told.

    Returns:
        Indices in the first and in the second set, in order, each pair once.
    """
    places: dict[Hashable, list[int]] = defaultdict(list)
    for index, prompt in enumerate(second):
        for key in keys(prompt):
            places[key].append(index)
    return [
        (index, other)
        for index, prompt in enumerate(first)
        for other in sorted({place for key in keys(prompt) for place in places.get(key, ())})
    ]


def keys(prompt: Prompt) -> set[Hashable]:
    """What a prompt may not have in common with one of another set: its text, its words, its scene."""
    found: set[Hashable] = {("text", folded(prompt.text))}
    given = prompt.metadata.get("text")
    # As the reward ocr takes them: the metadata's, else those in quotes.
    if words := folded(given if isinstance(given, str) and given else first_quoted(prompt.text)).replace(" ", ""):
        found.add(("words", words))
    if (scene := scene_key(prompt.metadata)) is not None:
        found.add(("scene", scene))
    return found


@functools.lru_cache(maxsize=4096)  # of the names of things, which come again and again
def folded(text: str) -> str:
    """A text without case, with single spaces, and with one spelling of each accented letter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def scene_key(metadata: Mapping[str, Any]) -> Hashable | None:
    """A scene's key, equal wherever the same things in the same relations are asked for; None where there is none.

    Read are GenEval's metadata (``include``: class, count, color, position; djghosh13/geneval) and those of the
    embedded worlds of shapes (``objects``: shape, colour, count, size; ``relation`` of the first to the second).

    Returns:
        The things, (name, count, color, size) each, and the relations between them, both sorted.
    """
    items = metadata.get("include", metadata.get("objects"))
    if not isinstance(items, Sequence) or not items or not all(isinstance(item, Mapping) for item in items):
        return None
    things = [_thing(item) for item in items]
    told = [(item.get("position"), number) for number, item in enumerate(items)]
    if isinstance(metadata.get("relation"), str):
        told = [([metadata["relation"], 1], 0)]
    edges = [
        _edge(position[0], things[number], things[position[1]])
        for position, number in told
        if _points(position, len(things))
    ]
    return tuple(sorted(things)), tuple(sorted(edges))


_Thing = tuple[str, ...]


def _thing(item: Mapping[str, Any]) -> _Thing:
    values = (
        item.get("class", item.get("shape")),
        item.get("count", 1),
        item.get("color", item.get("colour")),
        item.get("size"),
    )
    return tuple("" if value is None else folded(str(value)) for value in values)


def _points(position: Any, things: int) -> bool:
    """Whether it is a relation and the number of a thing."""
    pair = isinstance(position, Sequence) and not isinstance(position, str) and len(position) == 2
    return pair and isinstance(position[0], str) and isinstance(position[1], int) and 0 <= position[1] < things


def _edge(relation: str, subject: _Thing, target: _Thing) -> tuple[str, _Thing, _Thing]:
    relation = folded(relation)
    return (MIRRORED[relation], target, subject) if relation in MIRRORED else (relation, subject, target)
