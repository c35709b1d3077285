"""Several rewards as one: weights, titles, what they say of prompts, how each is computed; and rewards of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import MOST_PROBLEMS, UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards import (
    REWARDS,
    Reward,
    RewardSet,
    WeightedReward,
    WrappedReward,
    as_reward,
    load_reward,
    load_rewards,
)
from dgpo_plugin.rewards import scorer as scoring
from dgpo_plugin.rewards.scorer import Scorer

pytestmark = pytest.mark.fast

PICTURES, PROMPTS = torch.full((2, 3, 8, 8), 0.25), [Prompt("ab"), Prompt("abcd")]


class Short(Reward):
    """Judges prompts of at most three letters."""

    title = "shortness 2.0"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([float(-len(prompt.text)) for prompt in prompts])

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return [f"prompt {prompt.text!r} is too long" for prompt in prompts if len(prompt.text) > 3]


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.mean((1, 2, 3))


def together(**rewards: Reward | Callable[..., Tensor]) -> RewardSet:
    return RewardSet({label: WeightedReward(as_reward(reward)) for label, reward in rewards.items()})


# ---- sums and titles


def test_the_total_is_the_weighted_sum_over_the_last_axis() -> None:
    rewards = RewardSet(
        {
            "a": WeightedReward(as_reward(brightness), 2.0),
            "b": WeightedReward(Short(), -0.1),
            "c": WeightedReward(Short()),
        }
    )
    scores = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    assert rewards.names == ("a", "b", "c")
    assert torch.equal(rewards.total(scores), (scores * torch.tensor([2.0, -0.1, 1.0])).sum(2))
    assert rewards.score(PICTURES, PROMPTS).tolist() == [[0.25, -2, -2], [0.25, -4, -4]]


def test_a_card_tells_what_a_reward_calls_itself_else_its_name_and_every_weight_that_matters() -> None:
    assert together(mine=brightness).title == "mine"
    assert together(mine=Short()).title == "shortness 2.0"
    assert RewardSet({"mine": WeightedReward(Short(), -1.0)}).title == "-1 shortness 2.0"
    # Two that call themselves the same stay two.
    assert together(a=Short(), b=Short(), c=brightness).title == "1 shortness 2.0 + 1 shortness 2.0 + 1 c"
    labelled = load_rewards({"light": RewardTerm(reward="brightness"), "brightness": RewardTerm(weight=3)})
    assert labelled.title == "1 light (brightness) + 3 brightness"


def test_each_reward_gets_pictures_of_its_own() -> None:
    def blackens(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.zero_().flatten(1).mean(1)

    assert together(first=blackens, second=brightness).score(PICTURES, PROMPTS).tolist() == [[0, 0.25]] * 2


# ---- what they say of prompts


def test_every_reward_is_asked_about_every_prompt_and_all_that_is_wrong_is_told_at_once() -> None:
    rewards = load_rewards({"ocr": RewardTerm(), "scenes": RewardTerm(reward="shapes"), "sharpness": RewardTerm()})
    with pytest.raises(UserError) as caught:
        rewards.check([Prompt('"Hi"'), Prompt("a dog"), Prompt("a dog"), Prompt("a cat")])
    assert str(caught.value) == (
        "reward ocr: prompt 'a dog' asks for no words; put them in \"double quotes\"; "
        "prompt 'a cat' asks for no words; put them in \"double quotes\"; "
        "reward scenes: prompt '\"Hi\"' has no metadata; take its prompts from shapes/...; "
        "prompt 'a dog' has no metadata; take its prompts from shapes/...; "
        "prompt 'a cat' has no metadata; take its prompts from shapes/..."
    )
    rewards = load_rewards({"ocr": RewardTerm(), "sharpness": RewardTerm()})
    rewards.check([Prompt('"Hi"'), Prompt("a sign", {"text": "Hi"})])


def test_of_very_many_prompts_the_first_are_told_and_the_others_counted() -> None:
    prompts = [Prompt(f"prompt {n}") for n in range(MOST_PROBLEMS + 7)]
    with pytest.raises(UserError, match=f"'prompt {MOST_PROBLEMS - 1}' is too long; and 7 more prompts$"):
        together(short=Short()).check(prompts)


def test_a_wrapper_answers_everything_that_the_reward_inside_answers() -> None:
    inner = Short()
    inner.network = torch.nn.Linear(1, 1)
    wrapped = WrappedReward(WrappedReward(inner))
    wrapped.device = torch.device("meta")
    assert (wrapped.title, wrapped.network, inner.device) == ("shortness 2.0", inner.network, torch.device("meta"))
    assert wrapped.check(PROMPTS) == ["prompt 'abcd' is too long"]
    assert wrapped(PICTURES, PROMPTS).tolist() == [-2, -4]


# ---- each in its own way


def test_a_reward_is_computed_as_it_says_itself_and_else_as_all_are() -> None:
    shared = ScoringConfig(precision="bf16", retries=5, batch_size=4)
    terms = {"a": RewardTerm(reward="brightness", retries=0, offload=False), "b": RewardTerm(reward="sharpness")}
    first, second = load_rewards(terms, shared).members.values()
    assert first.scoring == ScoringConfig(precision="bf16", retries=0, batch_size=4)
    assert second.scoring == shared


def test_one_reward_is_tried_again_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RETRY_PAUSE", 0.0)
    calls = []

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append("steady")
        return brightness(images, prompts)

    def flaky(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append("flaky")
        if calls.count("flaky") < 3:
            raise ConnectionError("refused")
        return brightness(images, prompts)

    def members(retries: int) -> RewardSet:
        own = ScoringConfig(retries=retries)
        return RewardSet(
            {"steady": WeightedReward(as_reward(counted)), "flaky": WeightedReward(as_reward(flaky), scoring=own)}
        )

    values, _ = Scorer(members(retries=2)).submit(PICTURES, PROMPTS).result()
    assert values.tolist() == [[0.25, 0.25]] * 2
    assert (calls.count("steady"), calls.count("flaky")) == (1, 3)
    calls.clear()
    with pytest.raises(UserError, match="reward flaky: failed 1 times, last with ConnectionError: refused$"):
        Scorer(members(retries=0)).submit(PICTURES, PROMPTS).result()


def test_mistakes_are_told_with_the_label_that_tells_two_of_a_kind_apart() -> None:
    judges = {
        "looks": RewardTerm(reward="unifiedreward", options={"url": "http://a"}),
        "taste": RewardTerm(reward="judge"),
    }
    with pytest.raises(UserError, match="^reward taste: option url is missing"):
        load_rewards(judges)
    with pytest.raises(UserError, match="^reward words: prompt 'ab' asks for no words"):
        load_rewards({"words": RewardTerm(reward="ocr")}).score(PICTURES, PROMPTS)


# ---- rewards of others


WORLD = """
import torch
from dgpo_plugin.common.names import World

def reward(images, prompts):
    return torch.full((len(images),), 7.0)

WORLD = World(pipeline="/nowhere", reward=reward, about_reward="seven")
MUTE = World(pipeline="/nowhere")
"""


def installed(folder: Path, path: pytest.MonkeyPatch, entry_points: str) -> None:
    """A package by another maker, as pip leaves it."""
    (folder / "others_world.py").write_text(WORLD)
    metadata = folder / "others_world-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others-world\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    path.syspath_prepend(folder)


def test_a_worlds_reward_has_the_worlds_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "[dgpo_plugin.worlds]\nothers = others_world:WORLD\nmute = others_world:MUTE\n")
    entry = REWARDS.get("others")
    assert (entry.about, entry.package) == ("seven", "others-world")
    assert "mute" not in REWARDS
    assert load_reward("others")(PICTURES, PROMPTS).tolist() == [7, 7]
    file = tmp_path / "others_world.py"
    assert load_reward(f"{file}:WORLD")(PICTURES, PROMPTS).tolist() == [7, 7]
    with pytest.raises(UserError, match="MUTE: brings no reward"):
        load_reward(f"{file}:MUTE")
    assert REWARDS.get("shapes").about.startswith("half for the share of what was asked for")


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        ("[dgpo_plugin.rewards]\nocr = others_world:reward\n", "reward 'ocr': dgpo-plugin and others-world both bring"),
        ("[dgpo_plugin.worlds]\nocr = others_world:WORLD\n", "reward 'ocr': a world has that name"),
        (
            "[dgpo_plugin.rewards]\nbad = no_such_module:reward\n",
            "reward bad: no_such_module:reward of .* cannot be imp",
        ),
    ],
)
def test_packages_that_do_not_go_with_ours_are_one_line(
    entry_points: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, entry_points)
    with pytest.raises(UserError, match=message) as caught:
        load_reward("bad")
    assert "\n" not in str(caught.value)


def test_another_packages_reward_says_of_itself_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "[dgpo_plugin.rewards]\ntheirs = others_world:reward\n")
    assert REWARDS.get("theirs").facts() == ["its own", "weights: its own", "installed"]
    assert load_reward("theirs")(PICTURES, PROMPTS).tolist() == [7, 7]
