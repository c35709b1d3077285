"""Version 2 of the shapes world: what it says, its split, its verifier; and version 1, which stays as it was."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.registry import imported
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.prompts.files import prompts_hash
from dgpo_plugin.prompts.overlap import overlapping
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards.load import load_reward
from dgpo_plugin.worlds.shapes import scenes as first_version
from dgpo_plugin.worlds.shapes.render import BACKGROUND, SIZE, SceneObject, draw, layout, render
from dgpo_plugin.worlds.shapes.verify import UNKNOWN, detect, verify
from dgpo_plugin.worlds.shapes_2.pretrain import TASK_WEIGHTS, recipe, settings
from dgpo_plugin.worlds.shapes_2.scenes import HEADLINE, TASKS, VOCABULARY, all_prompts, caption

pytestmark = pytest.mark.fast

Picture = NDArray[np.float32]
FIGURES, COLORS, SIZES = VOCABULARY.figures, VOCABULARY.colors, tuple(VOCABULARY.sizes)
SETS = ("train", "validation", "held-out", "out-of-domain")

# ---- version 1


def test_version_1_says_draws_and_judges_what_it_did() -> None:
    """Hashes taken before there was a second version."""
    sets = (first_version.train_prompts, first_version.held_out_prompts, first_version.out_of_domain_prompts)
    assert [prompts_hash(each())[:16] for each in sets] == ["c5d450ab36c2df1d", "4b5d6cbd33253ac4", "dd61a4fa95e20c0d"]
    rng = np.random.default_rng(7)
    wanted = [dict(prompt.metadata) for prompt in first_version.all_prompts()]
    pictures = np.stack([render(wanted[index], rng) for index in range(0, 486, 6)])
    drawn = hashlib.sha256((pictures * 255).round().astype(np.uint8).tobytes()).hexdigest()
    assert drawn.startswith("f442f192781a3a52")
    noisy = np.clip(pictures + rng.normal(0, 0.12, pictures.shape), 0, 1).astype(np.float32)
    verdicts = verify(noisy, [wanted[(index + 6) % 486] for index in range(0, 486, 6)])
    verdicts += verify(noisy, [wanted[index] for index in range(0, 486, 6)])
    said = hashlib.sha256(repr([(each.strict, each.partial) for each in verdicts]).encode()).hexdigest()
    assert said.startswith("27fdc403b58110e5")


# ---- what it says

PHRASE = (
    rf"(?P<n>a|two|three|four) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<shape>{'|'.join(FIGURES)})(?P<s>(?:e?s)?)"
)
"""The grammar, written again from the outside."""


def test_every_caption_says_its_requirement_and_no_two_are_alike() -> None:
    for prompt in all_prompts():
        relation = prompt.metadata["relation"]
        for phrase, item in zip(prompt.text.split(f" {relation or 'and'} "), prompt.metadata["objects"], strict=True):
            match = re.fullmatch(PHRASE, phrase)
            assert match, prompt.text
            count = {"a": 1, "two": 2, "three": 3, "four": 4}[match["n"]]
            said = (match["shape"], match["color"], match["size"], count, bool(match["s"]))
            assert said == (item["shape"], item["colour"], item.get("size"), item["count"], count > 1)
    assert len({prompt.text for prompt in all_prompts()}) == len(all_prompts())
    assert caption({"objects": [{"shape": "cross", "colour": None, "count": 2}], "relation": None}) == "two crosses"


def test_how_many_prompts_each_task_has() -> None:
    """5 figures, 6 colors and 2 sizes, each of these or none."""
    assert Counter(prompt.metadata["task"] for prompt in all_prompts()) == {
        "single_object": 5,
        "two_objects": 5 * 4,
        "counting": 5 * 7 * 3 * 3,
        "colors": 5 * 6,
        "sizes": 5 * 2 * 7,
        "color_attribution": 30 * 25,  # the color is another, the figure may be the same
        "size_attribution": 5 * 4 * 2 + 30 * 20 * 2,
        "position": (5 * 4 + 30 * 20) * 4,
    }


# ---- how it is split


def test_no_two_sets_share_a_scene() -> None:
    for one, other in itertools.combinations(SETS, 2):
        assert overlapping(load_prompts(f"shapes-2/{one}"), load_prompts(f"shapes-2/{other}")) == []
    train = load_prompts("shapes-2/train")
    assert overlapping(train, train[:1])  # what would be found if there were any


def test_the_headlines_tasks_have_sixty_held_out_prompts_and_no_others() -> None:
    counts = Counter(prompt.metadata["task"] for prompt in load_prompts("shapes-2/held-out"))
    assert {task for task, count in counts.items() if count >= 60} == set(HEADLINE)
    assert set(counts) == set(TASKS) - {"position"}
    assert {prompt.metadata["task"] for prompt in load_prompts("shapes-2/out-of-domain")} == {"position"}
    assert {prompt.metadata["task"] for prompt in load_prompts("shapes-2/train")} == set(counts)


def test_a_scene_is_tested_once() -> None:
    for name in SETS[1:]:
        prompts = load_prompts(f"shapes-2/{name}")
        assert overlapping(prompts, prompts) == [(index, index) for index in range(len(prompts))]


def test_each_task_repeats_its_training_prompts_evenly() -> None:
    train = load_prompts("shapes-2/train")
    for task in set(TASKS) - {"position"}:
        times = Counter(prompt.text for prompt in train if prompt.metadata["task"] == task).values()
        assert max(times) - min(times) <= 1
        assert sum(times) == (240 if task in HEADLINE else 60)


# ---- the verifier


@cache
def truths(each: int = 60) -> list[tuple[dict[str, object], list[SceneObject]]]:
    rng = np.random.default_rng(0)
    by_task = [[dict(p.metadata) for p in all_prompts() if p.metadata["task"] == task] for task in TASKS]
    wanted = [prompts[rng.integers(len(prompts))] for prompts in by_task for _ in range(each)]
    return [(requirement, layout(requirement, rng, VOCABULARY)) for requirement in wanted]


def picture(things: list[SceneObject]) -> Picture:
    return draw(things, VOCABULARY)


def size_of(thing: SceneObject) -> str:
    return next(word for word, size in VOCABULARY.sizes.items() if size.radii[0] <= thing.radius <= size.radii[1])


def test_a_layout_has_what_was_asked_for() -> None:
    for requirement, things in truths():
        listed = [item for item in requirement["objects"] for _ in range(item["count"])]  # type: ignore[attr-defined]
        for item, thing in zip(listed, things, strict=True):
            assert thing.shape == item["shape"]
            assert item["colour"] in (None, thing.color)
            assert item.get("size") in (None, size_of(thing))


def test_truth_is_accepted() -> None:
    pictures = np.stack([picture(things) for _, things in truths()])
    verdicts = verify(pictures, [wanted for wanted, _ in truths()], VOCABULARY)
    assert np.mean([verdict.strict for verdict in verdicts]) >= 0.99
    for task in TASKS:
        judged = [v.strict for v, (wanted, _) in zip(verdicts, truths(), strict=True) if wanted["task"] == task]
        assert np.mean(judged) >= 0.95, task


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_is_read_at_each_size_wherever_it_stands(figure: str, size: str) -> None:
    rng = np.random.default_rng(1)
    places = [(rng.uniform(*VOCABULARY.sizes[size].radii), *rng.uniform(16, 48, 2)) for _ in range(200)]
    pictures = np.stack([picture([SceneObject(figure, "cyan", x, y, radius)]) for radius, x, y in places])
    found = [[(d.shape, d.color, d.size) for d in each] for each in detect(pictures, VOCABULARY)]
    assert np.mean([each == [(figure, "cyan", size)] for each in found]) >= 0.99


Corruption = Callable[[dict[str, object], list[SceneObject], np.random.Generator], Picture | None]


def missing(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    gone = rng.integers(len(things))
    return picture([thing for index, thing in enumerate(things) if index != gone])


def extra(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    for _attempt in range(100):
        x, y = map(float, rng.uniform(11, SIZE - 11, 2))
        if all(max(abs(x - t.x), abs(y - t.y)) > t.radius + 11 for t in things):
            return picture([*things, SceneObject(str(rng.choice(FIGURES)), str(rng.choice(COLORS)), x, y, 7.5)])
    return None


def wrong_figure(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    index = int(rng.integers(len(things)))
    used = {thing.shape for thing in things}
    figure = str(rng.choice([name for name in FIGURES if name not in used]))
    return picture([*things[:index], replace(things[index], shape=figure), *things[index + 1 :]])


def wrong_color(wanted: dict[str, object], things: list[SceneObject], rng: np.random.Generator) -> Picture | None:
    if wanted["objects"][0]["colour"] is None:  # type: ignore[index]
        return None
    index = int(rng.integers(len(things)))
    used = {thing.color for thing in things}
    color = str(rng.choice([name for name in COLORS if name not in used]))
    return picture([*things[:index], replace(things[index], color=color), *things[index + 1 :]])


def wrong_size(wanted: dict[str, object], things: list[SceneObject], _: object) -> Picture | None:
    if "size" not in wanted["objects"][0]:  # type: ignore[index]
        return None
    first = replace(things[0], radius=7.3 if things[0].radius > 8.5 else 10.2)
    return picture([first, *things[1:]])


def swapped_sizes(wanted: dict[str, object], things: list[SceneObject], _: object) -> Picture | None:
    if wanted["task"] != "size_attribution":
        return None
    a, b = things
    return picture([replace(a, x=b.x, y=b.y, radius=b.radius), replace(b, x=a.x, y=a.y, radius=a.radius)])


def cut(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    drawn, thing = picture(things), things[rng.integers(len(things))]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    u, v = columns - thing.x, rows - thing.y
    gone = (u > 0, u < 0, v > 0, v < 0)[rng.integers(4)] & (np.maximum(np.abs(u), np.abs(v)) < thing.radius + 1)
    drawn[:, gone] = BACKGROUND[:, None]
    return drawn


def blurred(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    """By about half a radius."""
    return np.stack([ndimage.gaussian_filter(channel, 4.5) for channel in picture(things)])


def noisy(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    return np.clip(picture(things) + rng.normal(0, 0.3, (3, SIZE, SIZE)), 0, 1).astype(np.float32)


def grey(_: object, things: list[SceneObject], rng: np.random.Generator) -> Picture:
    """One thing without its color."""
    index, level = int(rng.integers(len(things))), rng.uniform(0.4, 0.9)
    without = picture([thing for other, thing in enumerate(things) if other != index])
    alone = picture([replace(things[index], color="red")])
    cover = (alone[0] - BACKGROUND[0]) / (VOCABULARY.palette["red"][0] - BACKGROUND[0])
    return (without + cover * (level - without)).astype(np.float32)


CORRUPTIONS: dict[str, Corruption] = {
    corrupt.__name__: corrupt
    for corrupt in (missing, extra, wrong_figure, wrong_color, wrong_size, swapped_sizes, cut, blurred, noisy, grey)
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_truth_is_rejected_and_worth_less(name: str) -> None:
    rng = np.random.default_rng(2)
    tried = [(wanted, CORRUPTIONS[name](wanted, things, rng)) for wanted, things in truths()]
    pairs = [(wanted, drawn) for wanted, drawn in tried if drawn is not None]
    assert len(pairs) >= 60
    verdicts = verify(np.stack([drawn for _, drawn in pairs]), [wanted for wanted, _ in pairs], VOCABULARY)
    assert np.mean([verdict.strict for verdict in verdicts]) <= 0.02
    assert all(verdict.partial < 1 for verdict in verdicts if not verdict.strict)


def test_half_a_large_triangle_is_no_small_one() -> None:
    drawn = picture([SceneObject("triangle", "red", 32.0, 32.0, 10.75)])
    drawn[:, 32:] = BACKGROUND[:, None, None]
    (found,) = detect(drawn[None], VOCABULARY)[0]
    assert found.shape == UNKNOWN


def test_credit_is_shared_by_figure_color_and_size() -> None:
    drawn = picture([SceneObject("ring", "cyan", 32.0, 32.0, 7.4)])[None]
    cases = {("ring", "cyan", "small"): 1, ("ring", "cyan", "large"): 2 / 3, ("ring", "red", "large"): 1 / 3}
    for (figure, color, size), credit in cases.items():
        wanted = {"objects": [{"shape": figure, "colour": color, "size": size, "count": 1}], "relation": None}
        (verdict,) = verify(drawn, [wanted], VOCABULARY)
        assert verdict.partial == pytest.approx(credit)
        assert verdict.strict == (credit == 1)


def test_the_reward_knows_its_own_worlds_words() -> None:
    ring = Prompt("a ring", {"objects": [{"shape": "ring", "colour": None, "count": 1}], "relation": None})
    assert load_reward("shapes-2").check([ring]) == []
    (problem,) = load_reward("shapes").check([ring])
    assert "asks for ring, not in shapes; take its prompts from shapes/..." in problem
    with pytest.raises(UserError, match=r"take its prompts from shapes-2/\.\.\."):
        raise UserError(load_reward("shapes-2").check([Prompt("a ring")])[0])


# ---- the recipe


def test_the_recipe_sees_every_task_and_judges_no_test_prompt() -> None:
    assert imported(WORLDS.load("shapes-2").pretrain).__module__.endswith("shapes_2.pretrain")
    made = recipe()
    assert set(made.task_weights) == {prompt.metadata["task"] for prompt in made.judged} == set(TASKS)
    assert sum(TASK_WEIGHTS.values()) == pytest.approx(1)
    for name in ("held-out", "out-of-domain", "train"):
        assert overlapping(list(made.judged), load_prompts(f"shapes-2/{name}")) == []


# ---- training


def test_a_world_whose_pipeline_is_not_shipped_says_how_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(WORLDS.load("shapes-2"), pipeline=str(tmp_path / "absent"))
    monkeypatch.setattr(WORLDS, "load", lambda _name: elsewhere)
    with pytest.raises(UserError, match="dgpo worlds pretrain shapes-2 --output FOLDER"):
        world_pipeline("shapes-2")


def test_the_shipped_pipeline_is_that_of_the_recipe() -> None:
    """With its log: the settings that made it, and a base well but imperfectly trained at its best guidance."""
    folder = world_pipeline("shapes-2")
    lines = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {key: lines[0][key] for key in asdict(settings())} == asdict(settings())
    assert lines[-1]["iteration"] == settings().iterations
    best = max(accuracy["mean"] for key, accuracy in lines[-1].items() if key.startswith("accuracy_guidance_"))
    assert 0.5 <= best <= 0.65
    words = set(json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    assert {f"{word}</w>" for word in (*VOCABULARY.figures, *VOCABULARY.palette, *VOCABULARY.sizes)} <= words
