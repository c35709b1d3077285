"""Controls: what a run is told instead of the reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import base as algorithms
from dgpo_plugin.algorithms.advantages import aggregate
from dgpo_plugin.algorithms.base import Random
from dgpo_plugin.algorithms.rollout import Rollout
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.control import controlled

pytestmark = pytest.mark.fast

ADVANTAGES = torch.tensor([[1.0, -2.0, 3.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [2.0, 2.0, -1.0, -2.0, 0.0]])


def test_none_changes_nothing() -> None:
    assert controlled(ADVANTAGES, None, 0, 0) is ADVANTAGES


def test_zero_is_nothing_at_all() -> None:
    assert torch.equal(controlled(ADVANTAGES, "zero", 0, 0), torch.zeros(3, 5))


def test_the_best_of_each_group_is_alone_and_a_group_without_a_preference_has_none() -> None:
    expected = torch.zeros(3, 5)
    expected[0, 2] = expected[2, 0] = 1
    assert torch.equal(controlled(ADVANTAGES, "best", 0, 0), expected)


def test_shuffled_keeps_each_groups_values_and_draws_anew_each_iteration_and_seed() -> None:
    draws = [controlled(ADVANTAGES, "shuffled", seed, iteration) for seed in (0, 1) for iteration in range(4)]
    assert all(torch.equal(draw.sort(1).values, ADVANTAGES.sort(1).values) for draw in draws)
    assert len({tuple(draw[0].tolist()) for draw in draws}) > 4
    assert torch.equal(draws[5], controlled(ADVANTAGES, "shuffled", 1, 1))
    many = torch.stack([controlled(ADVANTAGES, "shuffled", 0, iteration)[0] for iteration in range(2000)])
    # Every place is dealt the group's mean.
    torch.testing.assert_close(many.mean(0), ADVANTAGES[0].mean().expand(5), atol=0.15, rtol=0)


@pytest.mark.parametrize("control", ["zero", "shuffled", "best"])
def test_the_algorithm_is_given_what_the_control_says(
    control: str, small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = small_config.training.model_copy(update={"control": control})
    trainer = build_trainer(small_config.model_copy(update={"training": section}))
    seen: list[Tensor] = []
    real = trainer._update  # noqa: SLF001

    def update(rollout: Rollout, given: Tensor, random: Random) -> dict[str, float]:
        seen.append(given)
        return real(rollout, given, random)

    monkeypatch.setattr(trainer, "_update", update)
    plain: list[Tensor] = []

    def noted(scores: Tensor, *rest: Any) -> Tensor:
        plain.append(aggregate(scores, *rest))
        return plain[-1]

    monkeypatch.setattr(algorithms, "aggregate", noted)
    trainer.iterate(3)
    assert torch.equal(seen[0], controlled(plain[0], control, section.seed, 3))  # type: ignore[arg-type]
    assert not torch.equal(seen[0], plain[0])
