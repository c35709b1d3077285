"""The trial of rewards that somebody else computes: a server's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards import RewardSet, WeightedReward, as_reward, load_rewards
from dgpo_plugin.rewards.trial import try_out
from tests.dgpo_plugin.served_rewards import serving

pytestmark = pytest.mark.fast

PROMPTS = [Prompt("one"), Prompt("two"), Prompt("three")]


@contextlib.contextmanager
def served(reward: Callable[..., Any]) -> Iterator[RewardSet]:
    """A function behind a server, as the reward of a run."""
    with serving(reward) as url:
        yield load_rewards({"far": RewardTerm(reward="remote", options={"urls": url})}, ScoringConfig(retries=0))


def test_a_served_reward_is_tried_over_the_wire() -> None:
    seen: list[Any] = []

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append((tuple(images.shape), [prompt.text for prompt in prompts]))
        return images.mean((1, 2, 3))

    with served(reward) as rewards:
        assert try_out(rewards, 24, 32, PROMPTS) == []
    assert seen == [((2, 3, 24, 32), ["one", "two"])]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ((torch.zeros(2), {}), r"returned 2 things, as in \(scores, info\)"),
        (None, r"returned nothing \(None\)"),
        (torch.zeros(3), r"returned shape \(3,\) for 2 images"),
    ],
)
def test_what_a_served_reward_gets_wrong_is_told_by_its_client(returned: Any, said: str) -> None:
    with (
        served(lambda images, prompts: returned) as rewards,
        pytest.raises(
            UserError, match=f"^reward far, tried on 2 noisy pictures of 32 x 32: http.* answers 422, .*{said}"
        ),
    ):
        try_out(rewards, 32, 32, PROMPTS)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_served_reward_raises_is_answered(kind: type[BaseException]) -> None:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise kind("bye\nbye")

    with (
        served(reward) as rewards,
        pytest.raises(UserError, match=f"^reward far, tried on .*500, {kind.__name__}: bye"),
    ):
        try_out(rewards, 32, 32, PROMPTS)


def test_what_a_served_reward_gives_for_noise_that_is_not_finite_is_a_warning() -> None:
    with served(lambda images, prompts: [float("nan"), 1.0]) as rewards:
        (line,) = try_out(rewards, 32, 32, PROMPTS)
    assert line.startswith("reward far: gives nan, nan for noisy pictures of 32 x 32")


def test_where_such_pictures_are_skipped_the_warning_says_so() -> None:
    skipping = ScoringConfig(on_failure="skip")
    rewards = RewardSet({"odd": WeightedReward(as_reward(lambda images, prompts: [math.nan, 1.0]), scoring=skipping)})
    (line,) = try_out(rewards, 32, 32, PROMPTS)
    assert line.endswith("a value that is not finite leaves its picture out")
