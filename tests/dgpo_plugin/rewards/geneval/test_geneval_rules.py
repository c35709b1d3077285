"""GenEval's rules on made-up detections: every task type, strict and partial, and what must not matter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards.geneval.rules import TAGS, Detection, kept, partial, read_task, relations, strict

pytestmark = pytest.mark.fast

LEFT, MIDDLE, RIGHT = (0, 40, 20, 60), (40, 40, 60, 60), (80, 40, 100, 60)
TOP, BOTTOM = (40, 0, 60, 20), (40, 80, 60, 100)
ABOVE_LEFT = (0, 0, 20, 20)


def found(name: str, box: tuple[float, float, float, float] = MIDDLE, score: float = 0.95) -> Detection:
    return Detection(name, score, box)


def by_place(colors: dict[tuple[float, float, float, float], str]) -> Any:
    """A color classifier that knows which color is where."""
    return lambda objects: [colors[thing.box] for thing in objects]


def no_colors(objects: Sequence[Detection]) -> list[str]:
    raise AssertionError("this task asks for no color")


def judge(metadata: dict[str, Any], detections: list[Detection], colors: Any = no_colors) -> tuple[float, float]:
    """(strict, partial)."""
    task = read_task(Prompt("a photo", metadata))
    objects = kept(detections, task.tag)
    return strict(task, objects, colors), partial(task, objects, colors)


def asked(tag: str, *include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": exclude or []}


def thing(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


# ---- the six task types, worked out by hand: (strict, partial)


@pytest.mark.parametrize(
    ("detections", "verdict"),
    [
        ([found("dog")], (1, 1)),
        ([found("dog"), found("cat")], (1, 1)),  # what was not asked for does not matter
        ([found("dog", LEFT), found("dog", RIGHT)], (1, 0)),  # 1 - |2 - 1| / 1
        ([found("dog", LEFT), found("dog", RIGHT), found("dog", TOP)], (1, -1)),
        ([found("cat")], (0, 0)),
        ([], (0, 0)),
        ([found("dog", score=0.31)], (1, 1)),
        ([found("dog", score=0.3)], (0, 0)),  # must be above
        ([found("dog", (n, 0, n + 1, 1)) for n in range(40)], (1, -14)),  # 16 are looked at
    ],
)
def test_single_object(detections: list[Detection], verdict: tuple[float, float]) -> None:
    assert judge(asked("single_object", thing("dog")), detections) == verdict


@pytest.mark.parametrize(
    ("detections", "verdict"),
    [
        ([found("dog"), found("bench")], (1, 1)),
        ([found("dog")], (0, 0.5)),
        ([found("dog"), found("bench", LEFT), found("bench", RIGHT)], (1, 0.5)),
    ],
)
def test_two_objects(detections: list[Detection], verdict: tuple[float, float]) -> None:
    assert judge(asked("two_object", thing("dog"), thing("bench")), detections) == verdict


@pytest.mark.parametrize(
    ("number", "score", "verdict"),
    [
        (4, 0.95, (1, 1)),
        (3, 0.95, (0, 0.75)),
        (1, 0.95, (0, 0.25)),
        (0, 0.95, (0, 0)),
        (5, 0.95, (0, 0.75)),  # one too many, which exclude forbids
        (8, 0.95, (0, 0)),
        (9, 0.95, (0, -0.25)),
        (4, 0.9, (0, 0)),  # counting takes only what is surer than 0.9
        (4, 0.89, (0, 0)),
    ],
)
def test_counting(number: int, score: float, verdict: tuple[float, float]) -> None:
    metadata = asked("counting", thing("cup", 4), exclude=[thing("cup", 5)])
    assert judge(metadata, [found("cup", (n, 0, n + 1, 1), score) for n in range(number)]) == verdict


@pytest.mark.parametrize(
    ("detections", "verdict"),
    [
        ([found("car", LEFT)], (1, 1)),
        ([found("car", RIGHT)], (0, 0.5)),  # the count, but not the color
        ([found("car", LEFT, 0.95), found("car", RIGHT, 0.94)], (1, 0)),  # the surest is looked at; (0 + 0) / 2
        ([found("car", LEFT, 0.94), found("car", RIGHT, 0.95)], (0, 0)),
        ([], (0, 0)),
    ],
)
def test_colors(detections: list[Detection], verdict: tuple[float, float]) -> None:
    colors = by_place({LEFT: "red", RIGHT: "blue"})
    assert judge(asked("colors", thing("car", color="red")), detections, colors) == verdict


def test_several_of_one_color() -> None:
    metadata = asked("colors", thing("car", 2, color="red"))
    two = [found("car", LEFT), found("car", RIGHT)]
    assert judge(metadata, two, by_place({LEFT: "red", RIGHT: "red"})) == (1, 1)
    assert judge(metadata, two, by_place({LEFT: "red", RIGHT: "blue"})) == (0, 0.75)  # (1 + (1 - 1/2)) / 2
    assert judge(metadata, two, by_place({LEFT: "pink", RIGHT: "blue"})) == (0, 0.5)


@pytest.mark.parametrize(
    ("detections", "verdict"),
    [
        ([found("dog", LEFT), found("cat", RIGHT)], (1, 1)),  # counts, counts, relation: all 1
        ([found("dog", RIGHT), found("cat", LEFT)], (0, 0.75)),  # (1 + 1 + 0 + 1) / 4
        ([found("dog", TOP), found("cat", BOTTOM)], (0, 0.75)),
        ([found("cat", RIGHT)], (0, pytest.approx(1 / 3))),  # (0 + 1 + 0) / 3: there is nothing to be right of
        ([found("dog", LEFT)], (0, pytest.approx(1 / 3))),
        ([found("dog", LEFT), found("cat", RIGHT), found("cat", ABOVE_LEFT, 0.99)], (0, pytest.approx(1 / 3))),
        ([found("dog", LEFT), found("cat", RIGHT), found("cat", TOP, 0.8)], (1, pytest.approx(1 / 3))),
        ([found("dog", LEFT), found("dog", TOP, 0.8), found("cat", RIGHT)], (1, pytest.approx(1 / 3))),
    ],
)
def test_position(detections: list[Detection], verdict: tuple[float, float]) -> None:
    metadata = asked("position", thing("dog"), thing("cat", position=["right of", 0]))
    assert judge(metadata, detections) == verdict


def test_a_relation_holds_between_all() -> None:
    metadata = asked("position", thing("dog", 2), thing("cat", position=["right of", 0]))
    assert judge(metadata, [found("dog", LEFT), found("dog", MIDDLE), found("cat", RIGHT)]) == (1, 1)
    assert judge(metadata, [found("dog", LEFT), found("dog", RIGHT), found("cat", MIDDLE)]) == (0, 0.75)


@pytest.mark.parametrize(
    ("colors", "verdict"),
    [
        ({LEFT: "red", RIGHT: "blue"}, (1, 1)),
        ({LEFT: "blue", RIGHT: "red"}, (0, 0.5)),
        ({LEFT: "red", RIGHT: "red"}, (0, 0.75)),
    ],
)
def test_color_attribution(colors: dict[Any, str], verdict: tuple[float, float]) -> None:
    metadata = asked("color_attr", thing("car", color="red"), thing("cup", color="blue"))
    assert judge(metadata, [found("car", LEFT), found("cup", RIGHT)], by_place(colors)) == verdict


def test_a_wrong_color_leaves_nothing_to_be_beside() -> None:
    metadata = asked("position", thing("dog", color="red"), thing("cat", position=["right of", 0]))
    pair = [found("dog", LEFT), found("cat", RIGHT)]
    assert judge(metadata, pair, by_place({LEFT: "red"})) == (1, 1)
    assert judge(metadata, pair, by_place({LEFT: "blue"})) == (0, 0.5)  # (1 + 0 + 1 + 0) / 4


# ---- relations

sides = st.integers(1, 60)
places = st.integers(-100, 100)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), places, places, sides, sides)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(boxes, boxes)
def test_relations_against_the_formula(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """How far a's centre is from b's in a direction, less a tenth of both sizes, is more than half the distance."""
    away = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    wide, high = (a[2] - a[0] + b[2] - b[0]) / 10, (a[3] - a[1] + b[3] - b[1]) / 10
    shifts = {
        "left of": (b[0] + b[2] - a[0] - a[2]) / 2 - wide,
        "right of": (a[0] + a[2] - b[0] - b[2]) / 2 - wide,
        "above": (b[1] + b[3] - a[1] - a[3]) / 2 - high,
        "below": (a[1] + a[3] - b[1] - b[3]) / 2 - high,
    }
    if any(abs(shift - away / 2) < 1e-9 for shift in shifts.values()):
        return  # on the edge, where rounding decides
    expected = {name for name, shift in shifts.items() if shift > away / 2}
    assert relations(Detection("a", 1, a), Detection("b", 1, b)) == expected  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(boxes, boxes, places, places)
def test_relations_do_not_depend_on_where_in_the_picture(a: Any, b: Any, x: int, y: int) -> None:
    here = relations(Detection("a", 1, a), Detection("b", 1, b))
    moved = [Detection("a", 1, (box[0] + x, box[1] + y, box[2] + x, box[3] + y)) for box in (a, b)]
    assert relations(*moved) == here
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(Detection("b", 1, b), Detection("a", 1, a)) == {opposite[name] for name in here}


def test_relations_in_the_picture() -> None:
    centre = found("a", MIDDLE)
    assert relations(found("b", LEFT), centre) == {"left of"}
    assert relations(found("b", TOP), centre) == {"above"}  # y grows downwards
    assert relations(found("b", (80, 80, 100, 100)), centre) == {"right of", "below"}
    assert relations(found("b", MIDDLE), centre) == set()
    assert relations(found("b", (42, 40, 62, 60)), centre) == set()  # 2 pixels are within a tenth of 40


# ---- what must not matter

scores = st.sampled_from([0.2, 0.5, 0.92, 0.99])
detections = st.lists(st.builds(Detection, st.sampled_from(["dog", "cat"]), scores, boxes), max_size=20)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(detections, st.randoms(use_true_random=False), st.sampled_from(TAGS))
def test_the_order_of_detections_does_not_matter(things: list[Detection], random: Any, tag: str) -> None:
    shuffled = list(things)
    random.shuffle(shuffled)
    objects = kept(things, tag)
    assert kept(shuffled, tag) == objects
    for group in objects.values():
        assert len(group) <= 16
        assert [d.score for d in group] == sorted((d.score for d in group), reverse=True)
        assert all(d.score > (0.9 if tag == "counting" else 0.3) for d in group)


TASKS = (
    asked("single_object", thing("dog")),
    asked("two_object", thing("dog"), thing("cat")),
    asked("counting", thing("dog", 2), exclude=[thing("dog", 3)]),
    asked("position", thing("dog"), thing("cat", position=["above", 0])),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(detections, st.sampled_from(TASKS))
def test_all_the_credit_means_that_the_verdict_is_good(things: list[Detection], metadata: dict[str, Any]) -> None:
    verdict, credit = judge(metadata, things)
    assert -14 <= credit <= 1
    assert verdict in (0, 1)
    if credit == 1:
        assert verdict == 1


# ---- metadata


def test_every_prompt_of_the_built_in_sets_is_a_task() -> None:
    prompts = load_prompts("geneval/train") + load_prompts("geneval/test")
    assert {read_task(prompt).tag for prompt in prompts} == set(TAGS)


def test_the_official_file_is_read(tmp_path: Path) -> None:
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 2}],
            "exclude": [{"class": "clock", "count": 3}],
            "prompt": "a photo of two clocks",
        },
        {
            "tag": "position",
            "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
            "prompt": "a photo of a dog right of a teddy bear",
        },
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    single, counting, position = (read_task(prompt) for prompt in read_prompts(file))
    assert (single.include[0].name, single.exclude) == ("bench", ())
    assert (counting.include[0].count, counting.exclude[0].count) == (2, 3)
    assert (position.include[1].relation, position.include[1].target) == ("right of", 0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'a photo' has no GenEval metadata .*take its prompts from geneval/train"),
        ({"tag": "colors"}, "has no GenEval metadata"),
        ({"tag": "colours", "include": [thing("dog")]}, "tag 'colours' is no task type; did you mean 'colors'"),
        ({"tag": "colors", "include": "dog"}, "include and exclude must be lists"),
        (asked("colors", {"count": 1}), "names no class"),
        (asked("colors", thing("doge")), "class 'doge' is not one of COCO's 80; did you mean 'dog'"),
        (asked("colors", thing("xyzzy")), "class 'xyzzy' is not one of COCO's 80$"),
        (asked("counting", thing("dog", 0)), r"dog needs a count of at least 1 \(given 0\)"),
        (asked("counting", {"class": "dog"}), "needs a count"),
        (asked("counting", thing("dog"), exclude=[thing("dog", -1)]), "needs a count"),
        (asked("colors", thing("dog", color="gray")), "no color 'gray'"),
        (asked("position", thing("dog", position=["beside", 0])), "must be one of left of, right of, above, below"),
        (asked("position", thing("dog", position=["above", 0])), "must point to one that include names before dog"),
        (asked("position", thing("cat"), thing("dog", position=["above", 1])), "must point to one"),
        (asked("position", thing("cat"), thing("dog", position=["above", -1])), "must point to one"),
    ],
)
def test_metadata_that_cannot_be_judged(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_task(Prompt("a photo", metadata))
    assert "\n" not in str(caught.value)
