"""The shapes world: what it can say, what it draws, and a verifier that is hard to fool."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.worlds.shapes.render import BACKGROUND, PALETTE, SIZE, SceneObject, draw, layout, render
from dgpo_plugin.worlds.shapes.scenes import (
    COLORS,
    NUMBER_WORDS,
    OUT_OF_DOMAIN_TASK,
    RELATIONS,
    SHAPES,
    TASKS,
    Requirement,
    all_prompts,
    caption,
    held_out_prompts,
    out_of_domain_prompts,
    train_prompts,
)
from dgpo_plugin.worlds.shapes.verify import UNKNOWN, Detection, Verdict, detect, judge, verify

pytestmark = pytest.mark.fast

quick = settings(max_examples=60, deadline=None, derandomize=True)
Picture = NDArray[np.float32]

# ---- captions

PHRASE = rf"(?:(?P<n>a|two|three|four) )?(?:(?P<colour>{'|'.join(COLORS)}) )?(?P<shape>{'|'.join(SHAPES)})(?P<s>s?)"
"""The grammar, written again from the outside; the joiners split a caption into phrases."""


def parsed(text: str) -> Requirement:
    """A caption read back: objects and relation."""
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    objects = []
    for phrase in text.split(f" {relation or 'and'} "):
        match = re.fullmatch(PHRASE, phrase)
        assert match, text
        count = {"a": 1, "two": 2, "three": 3, "four": 4}[match["n"]]
        assert bool(match["s"]) == (count > 1), text
        objects.append({"shape": match["shape"], "colour": match["colour"], "count": count})
    return {"objects": objects, "relation": relation}


def test_every_caption_says_its_requirement_and_no_two_are_alike() -> None:
    for prompt in all_prompts():
        said = parsed(prompt.text)
        assert (said["objects"], said["relation"]) == (prompt.metadata["objects"], prompt.metadata["relation"])
        assert caption(dict(prompt.metadata)) == prompt.text
    assert len({prompt.text for prompt in all_prompts()}) == len(all_prompts())


@pytest.mark.parametrize(
    "text",
    ["a circle", "a circle and a square", "three yellow triangles", "four circles", "a blue square"]
    + ["a red circle and a blue circle", "a circle left of a square", "a red circle above a green triangle"],
)
def test_captions_by_example(text: str) -> None:
    assert text in {prompt.text for prompt in all_prompts()}


def test_how_many_prompts_each_task_has() -> None:
    """3 shapes; ordered pairs of them; (colour or none) x shape x 2, 3, 4; colour x shape; ordered pairs of
    things of different colours, 12 x 9; pairs of different shapes, plain 6 or coloured 12 x 6, x 4 relations."""
    assert Counter(prompt.metadata["task"] for prompt in all_prompts()) == {
        "single_object": 3,
        "two_objects": 6,
        "counting": 5 * 3 * 3,
        "colours": 12,
        "colour_attribution": 12 * 9,
        "position": (6 + 72) * 4,
    }


# ---- the split


def scene(prompt: Prompt) -> str:
    """The same for captions that show the same things: the phrases in alphabetical order."""
    said = parsed(prompt.text)
    return f"{sorted(map(str, said['objects']))}"


def test_no_scene_is_in_two_sets() -> None:
    train, held_out, outside = (set(map(scene, f())) for f in (train_prompts, held_out_prompts, out_of_domain_prompts))
    assert not train & held_out
    relations = [parsed(prompt.text)["relation"] for f in (train_prompts, held_out_prompts) for prompt in f()]
    assert set(relations) == {None}
    assert {parsed(prompt.text)["relation"] for prompt in out_of_domain_prompts()} == set(RELATIONS)
    # The words of a position prompt without the relation may be trained on; the prompt itself never is.
    assert outside
    texts = [{prompt.text for prompt in f()} for f in (train_prompts, held_out_prompts, out_of_domain_prompts)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == len(all_prompts())


def test_out_of_domain_is_one_whole_task() -> None:
    tasks = [{p.metadata["task"] for p in f()} for f in (train_prompts, held_out_prompts, out_of_domain_prompts)]
    in_domain = set(TASKS) - {OUT_OF_DOMAIN_TASK}
    assert tasks == [in_domain, in_domain, {OUT_OF_DOMAIN_TASK}]


def test_a_quarter_of_each_tasks_scenes_is_held_out() -> None:
    for task in set(TASKS) - {OUT_OF_DOMAIN_TASK}:
        train, held_out = (
            {scene(p) for p in f() if p.metadata["task"] == task} for f in (train_prompts, held_out_prompts)
        )
        assert len(held_out) == -(-(len(train) + len(held_out)) // 4)  # rounded up


def test_the_sets_have_names() -> None:
    assert load_prompts("shapes/train") == train_prompts()
    assert load_prompts("shapes/held-out") == held_out_prompts()
    assert load_prompts("shapes/out-of-domain") == out_of_domain_prompts()


# ---- pictures


@cache
def truths(count: int = 1000) -> list[tuple[Requirement, list[SceneObject]]]:
    """Requirements in turn from every task, with a layout each."""
    by_task = [[dict(p.metadata) for p in all_prompts() if p.metadata["task"] == task] for task in TASKS]
    rng = np.random.default_rng(0)
    wanted = [by_task[i % len(TASKS)][rng.integers(len(by_task[i % len(TASKS)]))] for i in range(count)]
    return [(requirement, layout(requirement, rng)) for requirement in wanted]


def verdicts(pairs: list[tuple[Requirement, Picture]]) -> list[Verdict]:
    return verify(np.stack([picture for _, picture in pairs]).astype(np.float32), [wanted for wanted, _ in pairs])


def test_a_layout_is_what_was_asked_for() -> None:
    for requirement, things in truths():
        wanted = Counter(
            (item["shape"], item["colour"]) for item in requirement["objects"] for _ in range(item["count"])
        )
        shown = Counter((t.shape, t.color if (t.shape, None) not in wanted else None) for t in things)
        assert shown == wanted
        if requirement["relation"]:
            a, b = things
            holds = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
            assert holds[requirement["relation"]]


def test_things_are_apart_and_inside() -> None:
    for _, things in truths():
        for i, a in enumerate(things):
            assert a.radius < min(a.x, a.y, SIZE - a.x, SIZE - a.y)
            for b in things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_pictures_are_rgb_in_range_and_the_seeds_own() -> None:
    requirement = dict(all_prompts()[20].metadata)
    first, again, other = (render(requirement, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.shape, first.dtype) == ((3, SIZE, SIZE), np.dtype(np.float32))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    pictures = np.stack([draw(things) for _, things in truths()])
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_a_thing_is_drawn_where_it_stands() -> None:
    picture = draw([SceneObject("square", "red", 20.0, 40.0, 8.0)])
    covered = np.abs(picture - PALETTE["red"][:, None, None]).max(0) < 1e-6
    rows, columns = np.nonzero(covered)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (12, 27, 32, 47)
    np.testing.assert_allclose(picture[:, 0, 0], BACKGROUND)


# ---- the verifier on truth and on corrupted truth


def test_truth_is_accepted() -> None:
    accepted: dict[str, list[bool]] = {task: [] for task in TASKS}
    pairs = [(requirement, draw(things)) for requirement, things in truths()]
    for (requirement, _), verdict in zip(pairs, verdicts(pairs), strict=True):
        accepted[requirement["task"]].append(verdict.strict)
    assert all(len(values) >= 160 for values in accepted.values())
    assert {task: np.mean(values) >= 0.99 for task, values in accepted.items()} == dict.fromkeys(TASKS, True)


def test_detections_are_where_the_things_are() -> None:
    pictures = np.stack([draw(things) for _, things in truths()[:200]])
    for found, (_, things) in zip(detect(pictures), truths()[:200], strict=True):
        kinds = sorted((t.shape, t.color, t.x, t.y) for t in things)
        seen = sorted((d.shape, d.color, d.x, d.y) for d in found)
        assert [k[:2] for k in kinds] == [s[:2] for s in seen]
        centres = [[(s[2], s[3]) for s in seen if s[:2] == k[:2]] for k in kinds]
        for (_, _, x, y), near in zip(kinds, centres, strict=True):
            assert min(max(abs(x - a), abs(y - b)) for a, b in near) <= 1.0


Corruption = Callable[[Requirement, list[SceneObject], np.random.Generator], Picture | None]
"""A picture that no longer shows the requirement, or None where there is no such picture."""


def extra_object(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    for _ in range(100):
        x, y = rng.uniform(11, SIZE - 11, size=2)
        extra = SceneObject(str(rng.choice(SHAPES)), str(rng.choice(COLORS)), float(x), float(y), 8.0)
        if all(max(abs(x - t.x), abs(y - t.y)) > t.radius + 11 for t in things):
            return draw([*things, extra])
    return None


def missing_object(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    gone = rng.integers(len(things))
    return draw([thing for i, thing in enumerate(things) if i != gone])


def wrong_color(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    if requirement["objects"][0]["colour"] is None:
        return None
    i = rng.integers(len(things))
    used = {thing.color for thing in things}  # a colour that is nowhere else, so that no two things trade places
    color = str(rng.choice([c for c in COLORS if c not in used]))
    return draw([*things[:i], replace(things[i], color=color), *things[i + 1 :]])


def wrong_shape(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    i = rng.integers(len(things))
    shape = str(rng.choice([s for s in SHAPES if s != things[i].shape]))
    return draw([*things[:i], replace(things[i], shape=shape), *things[i + 1 :]])


def swapped_colors(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    asked = [item["colour"] for item in requirement["objects"]]
    if len(asked) < 2 or None in asked or things[0].shape == things[1].shape:
        return None
    a, b = things
    return draw([replace(a, color=b.color), replace(b, color=a.color)])


def swapped_places(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    if not requirement["relation"]:
        return None
    a, b = things
    return draw([replace(a, x=b.x, y=b.y, radius=b.radius), replace(b, x=a.x, y=a.y, radius=a.radius)])


def cut_in_half(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    picture, thing = draw(things), things[rng.integers(len(things))]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    u, v = columns - thing.x, rows - thing.y
    gone = (u > 0, u < 0, v > 0, v < 0)[rng.integers(4)] & (np.maximum(np.abs(u), np.abs(v)) < thing.radius + 1)
    picture[:, gone] = BACKGROUND[:, None]
    return picture


def heavy_blur(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    """Half a thing's radius: every shape melts into a round stain."""
    return np.stack([ndimage.gaussian_filter(channel, 4.0) for channel in draw(things)])


def strong_noise(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    return np.clip(draw(things) + rng.normal(0, 0.3, (3, SIZE, SIZE)), 0, 1).astype(np.float32)


def pure_noise(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    return rng.uniform(0, 1, (3, SIZE, SIZE)).astype(np.float32)


def blank(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    return draw([])


def touching(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    return _pushed_together(requirement, things, overlap=3.0)


def merged(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    return _pushed_together(requirement, things, overlap=8.0)


def _pushed_together(requirement: Requirement, things: list[SceneObject], overlap: float) -> Picture | None:
    """The second thing beside the first and of its colour, where the requirement leaves the colours free or equal."""
    asked = [item["colour"] for item in requirement["objects"]]
    if len(things) < 2 or (len(asked) == 2 and None not in asked):
        return None
    a, b = things[:2]
    towards_the_middle = 1 if a.x < SIZE / 2 else -1
    x = a.x + towards_the_middle * (a.radius + b.radius - overlap)
    y = a.y + a.radius - b.radius  # on a common ground line
    return draw([a, replace(b, x=x, y=y, color=a.color), *things[2:]])


def grey_object(requirement: Requirement, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    """One thing repainted; it loses its palette colour and keeps its shape."""
    i, level = rng.integers(len(things)), rng.uniform(0.3, 0.9)
    without, alone = draw([t for j, t in enumerate(things) if j != i]), draw([things[i]])
    cover = (alone[0] - BACKGROUND[0]) / (PALETTE[things[i].color][0] - BACKGROUND[0])
    return (without + cover * (level - without)).astype(np.float32)


CORRUPTIONS: dict[str, Corruption] = {
    corrupt.__name__: corrupt
    for corrupt in (extra_object, missing_object, wrong_color, wrong_shape, swapped_colors, swapped_places)
    + (cut_in_half, heavy_blur, strong_noise, pure_noise, blank, touching, merged, grey_object)
}


def corrupted(name: str, count: int = 300) -> list[tuple[Requirement, Picture]]:
    rng = np.random.default_rng(1)
    pictures = ((wanted, CORRUPTIONS[name](wanted, things, rng)) for wanted, things in truths())
    return [(wanted, picture) for wanted, picture in pictures if picture is not None][:count]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_truth_is_rejected_and_worth_less(name: str) -> None:
    pairs = corrupted(name)
    assert len(pairs) >= 100
    given_verdicts = verdicts(pairs)
    assert np.mean([verdict.strict for verdict in given_verdicts]) <= 0.02
    assert all(verdict.partial < 1 for verdict in given_verdicts if not verdict.strict)  # truth is worth 1
    assert np.mean([verdict.partial for verdict in given_verdicts]) <= 0.85


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_half_a_thing_is_no_thing_whichever_half(shape: str, side: str) -> None:
    """A triangle's top half is a perfect triangle again, of half the size."""
    picture = draw([SceneObject(shape, "red", 32.0, 32.0, 9.5)])
    halves = {"left": np.s_[:, :, :32], "right": np.s_[:, :, 32:], "top": np.s_[:, :32], "bottom": np.s_[:, 32:]}
    picture[halves[side]] = BACKGROUND[:, None, None]
    (found,) = detect(picture[None])[0]
    assert found.shape == UNKNOWN


def test_a_little_blur_and_noise_is_forgiven() -> None:
    """What a decoder does to a good picture must not hide it: the rules above are not bought with deafness."""
    rng = np.random.default_rng(2)
    soft = [(r, np.stack([ndimage.gaussian_filter(c, 0.5) for c in draw(things)])) for r, things in truths()[:300]]
    grainy = [
        (r, (draw(things) + rng.normal(0, 0.02, (3, SIZE, SIZE))).astype(np.float32)) for r, things in truths()[:300]
    ]
    for pairs in (soft, grainy):
        assert np.mean([verdict.strict for verdict in verdicts(pairs)]) >= 0.95


def test_a_picture_is_judged_alone() -> None:
    """Batches are labelled together: no thing may grow from one picture into the next."""
    pairs = [(requirement, draw(things)) for requirement, things in truths()[:40]]
    assert verdicts(pairs) == [verdicts([pair])[0] for pair in pairs]
    requirement, things = {**wanted("a red circle"), "task": "colours"}, [SceneObject("circle", "red", 32.0, 32.0, 8.0)]
    neighbours = [
        (requirement, grey_object(requirement, things, np.random.default_rng(0))),
        (requirement, draw(things)),
    ]
    assert verdicts(neighbours) == [Verdict(False, 0.5), Verdict(True, 1.0)]


@pytest.mark.parametrize("colors", [("red", "green"), ("green", "blue"), ("blue", "yellow"), ("red", "yellow")])
def test_things_of_two_colors_may_touch(colors: tuple[str, str]) -> None:
    side_by_side = [SceneObject("square", color, x, 32.0, 8.0) for color, x in zip(colors, (24.0, 40.0), strict=True)]
    assert sorted((d.shape, d.color) for d in detect(draw(side_by_side)[None])[0]) == sorted(
        ("square", color) for color in colors
    )


# ---- judge, by hand


def thing(kind: str, x: float = 32, y: float = 32) -> Detection:
    color, shape = kind.split()
    return Detection(shape, color, x, y, area=200)


def wanted(text: str) -> Requirement:
    return {"task": "any", **parsed(text)}


@pytest.mark.parametrize(
    ("text", "found", "partial"),
    [
        ("a circle", ["red circle"], 1),
        ("a circle", ["red square"], 0),
        ("a circle", [], 0),
        ("a circle", ["red circle", "red circle"], 1 / 2),  # an extra costs as much as a miss
        ("a circle", ["red circle", "blue square", "green square"], 1 / 3),
        ("a circle", ["unknown circle"], 1 / 2),
        ("a circle", ["red unknown"], 0),
        ("a red circle", ["red circle"], 1),
        ("a red circle", ["blue circle"], 1 / 2),
        ("a red circle", ["red square"], 1 / 2),
        ("a red circle", ["red unknown"], 1 / 2),
        ("a red circle", ["blue square"], 0),
        ("three circles", ["red circle", "blue circle", "red circle"], 1),
        ("three circles", ["red circle", "blue circle"], 2 / 3),
        ("three circles", ["red circle"] * 4, 3 / 4),
        ("three circles", ["red circle", "red circle", "red square"], 2 / 3),
        ("two red circles", ["red circle", "blue circle"], 3 / 4),
        ("a circle and a square", ["red square", "red circle"], 1),
        ("a circle and a square", ["red circle", "red circle"], 1 / 2),
        ("a red circle and a blue square", ["blue square", "red circle"], 1),
        ("a red circle and a blue square", ["red square", "blue circle"], 1 / 2),
        ("a red circle and a blue circle", ["red circle", "green circle"], 3 / 4),
    ],
)
def test_credit(text: str, found: list[str], partial: float) -> None:
    verdict = judge([thing(kind) for kind in found], wanted(text))
    assert verdict.partial == pytest.approx(partial)
    assert verdict.strict == (partial == 1)


@pytest.mark.parametrize(
    ("relation", "dx", "dy", "holds"),
    [
        ("left of", 20, 0, True),
        ("left of", -20, 0, False),
        ("left of", 0, 20, False),
        ("right of", -20, 0, True),
        ("right of", 20, 0, False),
        ("above", 0, 20, True),  # rows are counted downwards
        ("above", 0, -20, False),
        ("above", 20, 0, False),
        ("below", 0, -20, True),
        ("below", 0, 20, False),
        ("left of", 7.5, 0, False),  # hardly
        ("left of", 8, 0, True),
    ],
)
def test_relations(relation: str, dx: float, dy: float, holds: bool) -> None:
    found = [thing("red circle"), thing("blue square", 32 + dx, 32 + dy)]
    for seen in (found, found[::-1]):
        verdict = judge(seen, wanted(f"a circle {relation} a square"))
        assert verdict.strict == holds
    assert verdict.partial == pytest.approx(1 if holds else 2 / 3)


def test_a_relation_counts_only_between_the_right_shapes() -> None:
    left, right = thing("red circle", 10), thing("blue triangle", 50)
    assert judge([left, right], wanted("a circle left of a square")).partial == pytest.approx(1 / 3)
    assert judge([left], wanted("a circle left of a square")).partial == pytest.approx(1 / 3)
    assert judge([], wanted("a circle left of a square")) == Verdict(False, 0)
    square = thing("blue square", 50)
    assert judge([left, square], wanted("a green circle left of a blue square")).partial == pytest.approx(2.5 / 3)
    three = judge([left, square, right], wanted("a circle left of a square"))
    assert not three.strict
    assert three.partial == pytest.approx(3 / 4)


@pytest.mark.parametrize("order", [1, -1])
def test_a_relation_is_looked_for_among_equally_good_things(order: int) -> None:
    """Colours swapped, or two circles: assignments tie on shape and colour, and one of them has the relation."""
    swapped = [thing("blue circle", 10), thing("red square", 50)][::order]
    assert judge(swapped, wanted("a red circle left of a blue square")).partial == pytest.approx(2 / 3)
    circles = [thing("red circle", 10), thing("red circle", 60)][::order]
    verdict = judge([*circles, thing("blue square", 40)], wanted("a circle left of a square"))
    assert not verdict.strict
    assert verdict.partial == pytest.approx(3 / 4)


detections = st.lists(
    st.builds(
        Detection,
        st.sampled_from([*SHAPES, UNKNOWN]),
        st.sampled_from([*COLORS, UNKNOWN]),
        st.integers(0, 64).map(float),
        st.integers(0, 64).map(float),
        st.just(100),
    ),
    max_size=6,
)
requirements = st.sampled_from(all_prompts()).map(lambda prompt: dict(prompt.metadata))


@quick
@given(detections, requirements, st.randoms(use_true_random=False))
def test_credit_lies_in_the_unit_interval_is_full_only_for_truth_and_ignores_order(
    found: list[Detection], requirement: Requirement, random: object
) -> None:
    verdict = judge(found, requirement)
    assert 0 <= verdict.partial <= 1
    assert verdict.strict == (verdict.partial == 1)
    again = list(found)
    random.shuffle(again)  # type: ignore[attr-defined]
    other = judge(again, requirement)
    assert other.strict == verdict.strict
    assert other.partial == pytest.approx(verdict.partial)


def test_number_words_are_those_of_the_grammar() -> None:
    assert NUMBER_WORDS == {2: "two", 3: "three", 4: "four"}
