"""Prompts of two sets that ask for the same: by text, by words, by scene."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.overlap import overlapping

pytestmark = pytest.mark.fast


def thing(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _unquoted(*said: Any) -> str:
    return str(said).replace("'", "")


def scene(*include: dict[str, Any], tag: str = "two_object") -> Prompt:
    """With a text of its own, so that only the scene can be equal."""
    return Prompt(_unquoted("scene", include), {"tag": tag, "include": list(include)})


def shapes(*objects: tuple[str, str | None, int], relation: str | None = None, **more: Any) -> Prompt:
    listed = [{"shape": shape, "colour": color, "count": count, **more} for shape, color, count in objects]
    return Prompt(_unquoted("shapes", listed, relation), {"objects": listed, "relation": relation})


CUP, DOG = thing("cup"), thing("dog")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Prompt("a red  Fox\t"), Prompt(" A RED fox")),
        (Prompt("straße"), Prompt("STRASSE")),
        (Prompt("cafe\u0301"), Prompt("caf\u00e9")),
        (Prompt('a sign "Sold Out"'), Prompt("a mug with “SOLD  OUT” on it")),
        (Prompt('a sign "Sold Out"'), Prompt("a mug", {"text": "soldout"})),
        (scene(CUP, DOG), scene(DOG, CUP)),
        (scene(CUP, thing("dog", position=["left of", 0])), scene(DOG, thing("cup", position=["right of", 0]))),
        (scene(CUP, thing("dog", position=["below", 0])), scene(DOG, thing("cup", position=["above", 0]))),
        (scene(thing("cup", color="red")), scene(thing("cup", color="red"), tag="colors")),
        (scene({"class": "cup"}), scene(CUP)),
        (shapes(("circle", "red", 1), ("square", None, 1)), shapes(("square", None, 1), ("circle", "red", 1))),
        (
            shapes(("circle", None, 1), ("square", None, 1), relation="left of"),
            shapes(("square", None, 1), ("circle", None, 1), relation="right of"),
        ),
    ],
)
def test_the_same_is_found_from_either_side(one: Prompt, other: Prompt) -> None:
    assert overlapping([one], [other]) == [(0, 0)]
    assert overlapping([other], [one]) == [(0, 0)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Prompt("a red fox"), Prompt("a redfox")),
        (Prompt('a sign "Open"'), Prompt('a sign "Closed"')),
        (Prompt('a sign "Open"', {"text": "Closed"}), Prompt('the sign "Open"')),
        (scene(CUP, DOG), scene(CUP, CUP)),
        (scene(CUP, DOG), scene(CUP, thing("dog", 2))),
        (scene(thing("cup", color="red"), DOG), scene(CUP, thing("dog", color="red"))),
        (scene(CUP, DOG), scene(CUP, thing("dog", position=["left of", 0]))),
        (scene(CUP, thing("dog", position=["left of", 0])), scene(DOG, thing("cup", position=["left of", 0]))),
        (shapes(("circle", "red", 1)), shapes(("circle", "red", 2))),
        (shapes(("circle", "red", 1)), shapes(("circle", "red", 1), size="small")),
        (
            shapes(("circle", None, 1), ("square", None, 1), relation="left of"),
            shapes(("circle", None, 1), ("square", None, 1), relation="right of"),
        ),
    ],
)
def test_what_differs_is_not(one: Prompt, other: Prompt) -> None:
    assert overlapping([one], [other]) == []


def test_every_pair_once_and_in_order() -> None:
    first = [Prompt("b"), Prompt("a"), Prompt('c "d"'), Prompt("B")]
    second = [Prompt("B "), Prompt("e"), Prompt('C "D"'), Prompt("b")]
    assert overlapping(first, second) == [(0, 0), (0, 3), (2, 2), (3, 0), (3, 3)]
    assert overlapping([], second) == overlapping(first, []) == []


@pytest.mark.parametrize(
    "metadata",
    [
        {"include": "cup"},
        {"include": []},
        {"include": [3]},
        {"include": None},
        {"include": [{"class": "cup", "position": ["left of", 5]}]},
        {"include": [{"class": "cup", "position": "left of"}]},
        {"text": 3},
        {"objects": {"circle": 1}, "relation": 4},
    ],
)
def test_metadata_of_another_form_is_no_key_and_no_failure(metadata: dict[str, Any]) -> None:
    assert overlapping([Prompt("one", metadata)], [Prompt("two", {"tag": "x"})]) == []
