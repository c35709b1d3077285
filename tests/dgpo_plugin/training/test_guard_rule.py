"""When the guard's alarm is raised, which look it takes for the best, and how often it is raised by chance.

``pytest -s`` prints the rates of false alarms that docs/faq.md quotes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import GuardConfig
from dgpo_plugin.training.guard import GuardState, after_look, guard_prompts
from dgpo_plugin.training.paired import Difference, paired_difference

pytestmark = pytest.mark.fast

UP, DOWN, SAME = Difference(0.2, 0.05, 20), Difference(-0.2, 0.05, 20), Difference(-0.1, 0.05, 20)


def looked(*looks: tuple[Difference, Difference, Difference]) -> GuardState:
    """What is remembered after looks of (reward, sharpness, diversity), ten iterations and steps apart."""
    state = GuardState()
    for number, (reward, sharpness, diversity) in enumerate(looks, start=1):
        others = {"sharpness": sharpness, "diversity": diversity}
        state = after_look(state, 10 * number, 20 * number, reward, others)
    return state


def test_a_fall_at_two_looks_in_a_row_is_an_alarm_that_says_all() -> None:
    state = looked((UP, SAME, SAME), (UP, SAME, DOWN), (UP, SAME, DOWN))
    (alarm,) = state.alarms
    assert (alarm.iteration, alarm.since, alarm.name, alarm.best) == (30, 20, "diversity", 10)
    assert str(alarm) == (
        "after iteration 30: diversity fell by 0.2 (4.0 standard errors) while reward rose by 0.2 (4.0 standard "
        "errors), and both after iteration 20 too"
    )


@pytest.mark.parametrize(
    "looks",
    [
        [(UP, DOWN, SAME)],
        [(UP, DOWN, SAME), (UP, SAME, SAME), (UP, DOWN, SAME)],
        [(UP, DOWN, SAME), (UP, SAME, DOWN)],  # not the same thing
        [(UP, DOWN, SAME), (DOWN, DOWN, SAME), (UP, DOWN, SAME)],  # the reward was not up at both
        [(SAME, DOWN, DOWN), (SAME, DOWN, DOWN)],
        [(UP, SAME, SAME)] * 5,
    ],
)
def test_anything_less_is_none(looks: list[tuple[Difference, Difference, Difference]]) -> None:
    assert looked(*looks).alarms == ()


def test_each_thing_is_told_once() -> None:
    state = looked(*[(UP, DOWN, SAME)] * 3, *[(UP, DOWN, DOWN)] * 3)
    assert [(alarm.name, alarm.iteration) for alarm in state.alarms] == [("sharpness", 20), ("diversity", 50)]


def test_the_best_look_is_the_highest_reward_where_nothing_had_fallen() -> None:
    more, less = Difference(0.4, 0.05, 20), Difference(0.1, 0.05, 20)
    state = looked((UP, SAME, SAME), (less, SAME, SAME), (more, DOWN, SAME))
    assert (state.best, state.best_steps, state.best_gain) == (10, 20, 0.2)
    assert looked((UP, SAME, SAME), (more, SAME, SAME)).best == 20
    assert looked((DOWN, SAME, SAME), (more, SAME, DOWN)).best == 0, "then it is the base"


def test_what_is_remembered_outlives_a_checkpoint() -> None:
    state = looked((UP, SAME, SAME), (UP, DOWN, SAME), (UP, DOWN, SAME))
    assert GuardState.model_validate_json(state.model_dump_json()) == state


def test_its_prompts_are_spread_over_those_that_are_not_trained_on() -> None:
    held_out = [Prompt(f"prompt {n}") for n in range(40)]
    train = [Prompt(f" PROMPT  {n}") for n in range(0, 40, 2)]
    chosen = guard_prompts(train, held_out, GuardConfig(prompts=10))
    assert [prompt.text for prompt in chosen] == [f"prompt {n}" for n in range(1, 40, 4)]
    assert len(guard_prompts(train, held_out, GuardConfig(prompts=32))) == 20
    with pytest.raises(UserError, match=r"training\.guard: 7 of the 8 prompts of prompts\.held_out are not trained on"):
        guard_prompts([held_out[0]], held_out[:8], GuardConfig())


# ---- how often by chance

PROMPTS, IMAGES, LOOKS, RUNS = 32, 2, 10, 1000
WATCHED = ("sharpness", "diversity", "metric")


def fired(draw: Tensor, gain: float) -> bool:
    """Whether a run of differences, (looks, 1 + watched, P, I), the reward's first, raises any alarm."""
    state, base = GuardState(), torch.zeros(PROMPTS, IMAGES)
    for number, look in enumerate(draw, start=1):
        found = [paired_difference(base, each) for each in look]
        reward = Difference(found[0].mean + gain, found[0].error, PROMPTS)
        state = after_look(state, number, number, reward, dict(zip(WATCHED, found[1:], strict=True)))
    return bool(state.alarms)


def false_alarms(*, walks: bool, gain: float, seed: int) -> float:
    """The share of runs with an alarm, of a policy that changes no metric on the whole.

    Args:
        walks: each prompt's difference wanders from look to look, and does not come anew.
        gain: what the reward has gained, in standard deviations of a picture's difference.
    """
    generator, count = torch.Generator().manual_seed(seed), 0
    for _ in range(RUNS):
        draw = torch.randn(LOOKS, 1 + len(WATCHED), PROMPTS, 1, generator=generator)
        if walks:
            draw = draw.cumsum(0)
        draw = draw + 0.5 * torch.randn(LOOKS, 1 + len(WATCHED), PROMPTS, IMAGES, generator=generator)
        count += fired(draw, gain)
    return count / RUNS


CASES: Sequence[tuple[bool, float, float]] = [
    (False, 9.0, 0.005),
    (True, 0.0, 0.02),
    (True, 9.0, 0.03),
]


@pytest.mark.parametrize(("walks", "gain", "most"), CASES)
def test_a_policy_that_harms_nothing_is_hardly_ever_accused(walks: bool, gain: float, most: float) -> None:
    """In ten looks at three things; ``gain`` 0 is a policy that is equal to the base but for chance."""
    rate = false_alarms(walks=walks, gain=gain, seed=7)
    print(f"prompts {'wander' if walks else 'are drawn anew'}, gain {gain:g}: {rate:.1%} of {RUNS} runs")
    assert rate <= most


def test_one_look_alone_would_accuse_far_more_often() -> None:
    """Why there are two in a row."""
    generator, alone = torch.Generator().manual_seed(7), 0
    base = torch.zeros(PROMPTS, 1)
    for _ in range(RUNS // 2):
        draw = torch.randn(LOOKS * len(WATCHED), PROMPTS, 1, generator=generator)
        alone += any(paired_difference(base, each).fell for each in draw)
    assert alone / (RUNS // 2) > 0.04


def test_a_policy_that_harms_is_accused_at_the_second_look() -> None:
    generator = torch.Generator().manual_seed(3)
    draw = 0.5 * torch.randn(2, 1 + len(WATCHED), PROMPTS, IMAGES, generator=generator)
    draw[:, 1] -= 1.0
    assert fired(draw, 1.0)
    assert not fired(draw[:1], 1.0)
    assert not fired(draw, -1.0), "nothing is gained, so nothing is hacked"
