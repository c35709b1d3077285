"""Going through an iteration's samples several times: more steps, each with draws of its own, no rollout more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Random, Rollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import one_reward
from tests.dgpo_plugin.algorithm_cases import ALGORITHMS, TRAJECTORY, config_for
from tests.dgpo_plugin.training.test_trainer import Scripted

pytestmark = pytest.mark.fast


def trainer_of(algorithm: str, *changes: str) -> Trainer:
    """One whose groups all differ in reward, so that every update is a step."""
    config = config_for(algorithm, *changes)
    rising = one_reward(Scripted(lambda count: torch.arange(count).float())) if config.pairs is None else None
    if algorithm == "flow-grpo-gardo":
        rising = None  # it asks for a second reward, of weight 0
    return build_trainer(config, rewards=rising)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_is_one_more_step_for_no_further_rollout(algorithm: str) -> None:
    once, thrice = trainer_of(algorithm), trainer_of(algorithm, "training.inner_epochs=3")
    alone, records = next(once.iterations()), next(thrice.iterations())
    assert (once.steps, thrice.steps) == (1, 3)
    assert records["rollout_evaluations"] == alone["rollout_evaluations"]
    assert records["differentiated_evaluations"] == 3 * alone["differentiated_evaluations"]
    assert records.get("reward") == alone.get("reward")
    told, single = (type(each.algorithm).cost(each.config) for each in (thrice, once))
    assert told.trained_steps == 3 * single.trained_steps
    # Of online DPO's evaluations a share is a sample's, rounded up.
    assert 3 * single.training - 2 <= told.training <= 3 * single.training
    assert (told.sampling, told.latents) == (single.sampling, single.latents)


@pytest.mark.parametrize("algorithm", ["dgpo", "nft", "elbo", "ram", "flow-grpo"])
def test_two_are_two_updates_by_hand_with_draws_of_their_own(algorithm: str) -> None:
    twice, by_hand = trainer_of(algorithm, "training.inner_epochs=2"), trainer_of(algorithm)
    gradient, seen = twice.algorithm.gradient, []

    def watched(rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        seen.append((rollout, advantages, random))
        return gradient(rollout, advantages, random)

    twice.algorithm.gradient = watched  # type: ignore[method-assign]
    next(twice.iterations())
    assert [random for *_, random in seen] == [Random(0, 0), Random(0, 0, epoch=1)]
    assert [rollout.first_update for rollout, *_ in seen] == [True, False]
    for rollout, advantages, random in seen:
        assert torch.equal(rollout.latents, seen[0][0].latents)
        with by_hand.policy.updating():
            by_hand.algorithm.gradient(rollout, advantages, random)
        by_hand.optimizer_step()
    found, expected = twice.policy.copy_weights(), by_hand.policy.copy_weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_draws_of_the_first_are_those_of_one_and_of_the_others_their_own() -> None:
    """A run with one is to the bit what it was before there could be more."""
    assert torch.equal(Random(3, 4).noise((5,), "training noise", 1), seeded_noise((5,), 3, 4, "training noise", 1))
    drawn = [Random(3, 4, epoch) for epoch in range(4)]
    assert len({tuple(each.noise((3,), "training noise", 1).tolist()) for each in drawn}) == 4
    assert len({tuple(each.uniform(3, "timesteps")) for each in drawn}) == 4
    assert len({tuple(each.choose(5, 20, "timesteps")) for each in drawn}) > 1


@pytest.mark.parametrize("algorithm", ["flow-grpo", "flow-grpo-fast"])
def test_a_later_one_is_held_against_the_policy_that_sampled(algorithm: str) -> None:
    """Its ratios are no longer 1, though its groups are the first ones again."""
    trainer = trainer_of(algorithm, "training.inner_epochs=2", "training.learning_rate=0.02", "algorithm.clip=1e-4")
    gradient, logs = trainer.algorithm.gradient, list[dict[str, float]]()
    trainer.algorithm.gradient = lambda *given: logs.append(gradient(*given)) or logs[-1]  # type: ignore
    record = next(trainer.iterations())
    assert (logs[0]["ratio"], logs[0]["clip_fraction"]) == (1, 0)
    assert logs[1]["ratio"] != 1
    assert logs[1]["clip_fraction"] > 0.2
    assert record["ratio_deviation"] == logs[0]["ratio_deviation"]
    assert "ratio_deviation" not in logs[1]


def test_a_policy_gradient_on_the_elbo_clips_in_a_later_one() -> None:
    changes = ["training.inner_epochs=2", "training.learning_rate=0.05", "algorithm.ratio_clip=1e-6"]
    once, twice = trainer_of("elbo", *changes[1:]), trainer_of("elbo", *changes)
    assert next(once.iterations())["clip_fraction"] == 0
    record = next(twice.iterations())
    assert record["clip_fraction"] > 0.1
    cost = type(twice.algorithm).cost(twice.config)
    assert record["denoiser_evaluations"] <= 8 * (cost.sampling + cost.training)


@pytest.mark.parametrize("algorithm", TRAJECTORY)
def test_kept_graphs_are_of_one_alone(algorithm: str) -> None:
    with pytest.raises(UserError, match=r"training.inner_epochs \(2\) must be 1 for algorithm.keep_graphs") as caught:
        config_for(algorithm, "algorithm.keep_graphs=true", "training.inner_epochs=2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5"])
def test_none_at_all_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="inner_epochs"):
        config_for("dgpo", f"training.inner_epochs={wrong}")
