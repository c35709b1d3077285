"""Flow-GRPO's probability ratio is 1 in an iteration's first update, whatever batches it is computed in."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Batch, Random, Rollout
from dgpo_plugin.algorithms.rollout import join, micro_batches
from dgpo_plugin.algorithms.trajectories import TrajectoryRollout
from dgpo_plugin.config.fields import LoraConfig, ModelConfig, RunConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from tests.conftest import spread
from tests.dgpo_plugin.algorithm_cases import config_for, make_algorithm, whole_batch

GROUPS, SIZE = 3, 4
TEXTS = ["a red circle", "two blue squares", "a green triangle"]


@functools.cache
def policy_in(precision: str) -> Policy:
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1, precision=precision))
    return spread(Policy(model, LoraConfig(rank=4, alpha=8), seed=0))


def sampled(config: RunConfig, policy: Policy, size: int | None) -> Rollout:
    """An iteration's samples, in micro-batches of a size."""
    algorithm, whole = make_algorithm(config, policy), whole_batch(config, policy, TEXTS, SIZE)

    def batch(ids: Tensor) -> Batch:
        return replace(whole, sample_ids=ids, conditioning=whole.conditioning[ids])

    return join([algorithm.sample(batch(ids), Random(0, 0)) for ids in micro_batches(whole.sample_ids, size)])


def advantages() -> Tensor:
    """A few images are no better or worse than their group and drop out, so that a batch is not the rollout's."""
    drawn = torch.randn(GROUPS, SIZE, generator=torch.Generator().manual_seed(1))
    drawn[0, 2] = drawn[1, 3] = drawn[2, 0] = 0
    return drawn


def update(config: RunConfig, policy: Policy, rollout: Rollout, given: Tensor) -> dict[str, float]:
    for parameter in policy.parameters.values():
        parameter.grad = None
    return make_algorithm(config, policy).gradient(rollout, given, Random(0, 0))


@pytest.mark.parametrize(("algorithm", "guidance"), [("flow-grpo", 1), ("flow-grpo-fast", 3)])
@pytest.mark.parametrize(
    "precision", [pytest.param("fp32", marks=pytest.mark.fast), pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_the_ratio_is_one_in_every_batch(
    algorithm: str, precision: str, guidance: int, request: pytest.FixtureRequest
) -> None:
    if precision == "bf16":
        request.getfixturevalue("bf16")
    policy = policy_in(precision)
    config = config_for(algorithm, f"algorithm.guidance={guidance}", "training.micro_batch_size=3")
    logged = update(config, policy, sampled(config, policy, size=None), advantages())
    assert logged["ratio"] == 1
    assert logged["clip_fraction"] == 0
    # What the rollout's own log-probability would have made of it: rounding, and no more than that.
    assert logged["ratio_deviation"] < (1e-5 if precision == "fp32" else 1e-2)
    assert any(bool(parameter.grad.any()) for parameter in policy.parameters.values() if parameter.grad is not None)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ["flow-grpo", "flow-grpo-fast"])
def test_rounding_of_another_batch_clips_nothing_and_is_logged(algorithm: str) -> None:
    """Stood in for by log-probabilities of the rollout that are a little off, as another batch's in bf16 are."""
    config, policy = config_for(algorithm), policy_in("fp32")
    rollout, given = sampled(config, policy, None), advantages()
    assert isinstance(rollout, TrajectoryRollout)
    exact = update(config, policy, rollout, given)
    expected = [parameter.grad for parameter in policy.parameters.values()]
    off = 5e-4 * torch.linspace(-1, 1, GROUPS * SIZE)
    shifted = replace(rollout, log_probability=rollout.log_probability + off[:, None])
    logged = update(config, policy, shifted, given)
    assert (logged["ratio"], logged["clip_fraction"], logged["loss"]) == (1, 0, exact["loss"])
    for parameter, slope in zip(policy.parameters.values(), expected, strict=True):
        assert torch.equal(parameter.grad, slope)  # type: ignore[arg-type]
    moving = given.flatten() != 0
    worst = (torch.exp(-off.double()) - 1).abs()[moving].max().item()
    assert logged["ratio_deviation"] == pytest.approx(worst, rel=1e-2)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ["flow-grpo", "flow-grpo-fast"])
def test_later_updates_are_held_against_the_rollout(policy: Policy, algorithm: str) -> None:
    config = config_for(algorithm)
    rollout, given = sampled(config, policy, None), advantages()
    _, (rows, second), _ = rollout.per_update(3)
    for parameter in policy.parameters.values():
        parameter.data += 0.02
    logged = update(config, policy, second, given[rows])
    assert logged["clip_fraction"] > 0.5
    assert logged["ratio"] != 1
    assert "ratio_deviation" not in logged


@pytest.mark.fast
def test_an_iteration_logs_its_first_updates_deviation_undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(config_for("flow-grpo", "training.updates_per_iteration=2"))
    logs = iter([{"loss": 1.0, "kl": 0.0, "ratio_deviation": 0.5}, {"loss": 2.0, "kl": 0.0}])
    monkeypatch.setattr(trainer.algorithm, "gradient", lambda *_: next(logs))
    record = next(trainer.iterations())
    assert (record["loss"], record["ratio_deviation"]) == (1.5, 0.5)


@pytest.mark.fast
def test_a_run_logs_it() -> None:
    record = next(build_trainer(config_for("flow-grpo-fast", "training.updates_per_iteration=2")).iterations())
    assert 0 <= record["ratio_deviation"] < 1e-5
