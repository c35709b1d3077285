"""The loop: geometry, micro-batches, determinism, learning, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Layout, Random, Rollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import LoraConfig, ModelConfig, RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from tests.conftest import needs_bf16, one_reward, spread
from tests.dgpo_plugin.algorithm_cases import (
    ALGORITHMS,
    TRAJECTORY,
    config_for,
    in_float64,
    make_algorithm,
    rollout_and_advantages,
)


def gradients(config: RunConfig, policy: Policy, rollout: Rollout, advantages: Tensor, steps: int = 0) -> list[Tensor]:
    """The gradient of one update; ``steps`` > 0 makes the old policy another than the policy."""
    algorithm = make_algorithm(config, policy)
    if steps:
        algorithm.after_step(steps)
        for name, copy in algorithm.state().items():
            for old in copy.values() if name != "gate" else ():  # GARDO's is no copy of the adapter
                old.mul_(0.9)
    for parameter in policy.parameters.values():
        parameter.grad = None
    algorithm.gradient(rollout, advantages, Random(0, 0))
    return [parameter.grad.clone() for parameter in policy.parameters.values()]  # type: ignore[union-attr]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("dgpo", []),
        ("dgpo", ["algorithm.kl_weight=0.5", "algorithm.clip=0.001"]),
        ("dgpo", ["algorithm.reference=old_policy", "algorithm.kl_weight=0.5"]),
        ("dgpo", ["algorithm.reference_guidance=3", "algorithm.rollout_guidance=2"]),
        ("dgpo", ["algorithm.t_min=0.4", "algorithm.text_dropout=0.5", "algorithm.clip=0.001"]),
        ("flow-grpo", []),
        ("flow-grpo-fast", []),
        ("flow-grpo-guard", []),
        ("flow-grpo-gardo", []),
        ("flow-dppo", []),
    ],
)
def test_micro_batch_size_never_changes_the_gradient(policy: Policy, algorithm: str, extra: list[str]) -> None:
    in_float64(policy)
    config = config_for(algorithm, *extra)
    rollout, advantages = rollout_and_advantages(config, policy)
    whole = gradients(config, policy, rollout, advantages, steps=3)
    assert max(float(g.abs().max()) for g in whole) > 0
    for size in (1, 3, 4, 7):
        parts = config_for(algorithm, *extra, f"training.micro_batch_size={size}")
        for a, b in zip(whole, gradients(parts, policy, rollout, advantages, steps=3), strict=True):
            # float32 parameters under float64 sums: only the last float32 bits may differ.
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ["dgpo", "elbo", *TRAJECTORY])  # the others' noise is each place's own
def test_order_of_images_in_a_group_does_not_matter(policy: Policy, algorithm: str) -> None:
    in_float64(policy)
    config = config_for(algorithm)
    rollout, advantages = rollout_and_advantages(config, policy)
    order = torch.tensor([2, 0, 3, 1])
    images = torch.cat([order, 4 + order])
    # The same places in the iteration, other pictures in them.
    shuffled = replace(rollout.select(images), sample_ids=rollout.sample_ids)
    plain = gradients(config, policy, rollout, advantages)
    for a, b in zip(plain, gradients(config, policy, shuffled, advantages[:, order]), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_is_deterministic_and_seeded(algorithm: str) -> None:
    def weights(seed: int) -> list[Tensor]:
        trainer = build_trainer(config_for(algorithm, f"training.seed={seed}"))
        for _ in trainer.iterations():
            pass
        return list(trainer.policy.copy_weights().values())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_first_ratio_is_one_and_kl_zero(policy: Policy, algorithm: str) -> None:
    """The policy that sampled is the one that is trained: nothing is clipped on the first update."""
    config = config_for(algorithm)
    rollout, advantages = rollout_and_advantages(config, policy)
    logged = make_algorithm(config, policy).gradient(rollout, advantages, Random(0, 0))
    assert logged.get("clip_fraction", 0) == 0
    if "ratio" in logged:
        assert logged["ratio"] == 1
        assert logged["ratio_deviation"] < 1e-5


@pytest.mark.fast
def test_training_noise_is_shared_inside_a_group_and_not_between(policy: Policy) -> None:
    random, layout = Random(0, 3), Layout(2, 2)
    ids = torch.arange(4)
    assert len({tuple(n.flatten().tolist()) for n in random.sample_noise((2, 2), ids, layout, "initial noise")}) == 4
    noise = random.group_noise((4,), ids, layout, "training noise", 1)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[2])
    # One process's share draws what it would have drawn among all.
    assert torch.equal(random.group_noise((4,), ids[1::2], layout, "training noise", 1), noise[1::2])
    assert not torch.equal(noise, random.group_noise((4,), ids, layout, "training noise", 2))
    assert not torch.equal(noise, Random(0, 4).group_noise((4,), ids, layout, "training noise", 1))


class Scripted:
    """A reward that returns what the test wants."""

    def __init__(self, values: Callable[[int], Tensor]) -> None:
        self.values = values

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.values(len(images))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: torch.full((n,), float("nan")), "8 of 8 values are not finite"),
        (lambda n: torch.tensor([float("inf")] + [0.0] * (n - 1)), "1 of 8 values are not finite"),
        (lambda n: torch.zeros(n - 1), r"returned shape \(7,\) for 8 images"),
        (lambda n: torch.zeros(n, 1), r"returned shape \(8, 1\) for 8 images"),
    ],
)
def test_broken_rewards_stop_the_run(small_config: RunConfig, values: Callable[[int], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(build_trainer(small_config, rewards=one_reward(Scripted(values))).iterations())


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rewards_that_never_differ_train_nothing_but_the_kl_term(algorithm: str) -> None:
    anchor = {"ram": [], "online-dpo": [], "crd": ["algorithm.anchor_weight=0"]}.get(
        algorithm, ["algorithm.kl_weight=0"]
    )
    trainer = build_trainer(config_for(algorithm, *anchor), rewards=one_reward(Scripted(torch.ones)))
    before = trainer.policy.copy_weights()
    record = next(trainer.iterations())
    assert record["constant_groups"] == 1
    assert record["grad_norm"] == 0
    after = trainer.policy.copy_weights()
    change = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert change < 1e-6  # weight decay alone


@pytest.mark.fast
def test_updates_split_the_groups_and_count_as_steps() -> None:
    # Rewards that differ in every group: a group of equal ones has no gradient and takes no step.
    rising = Scripted(lambda count: torch.arange(count).float())
    trainer = build_trainer(config_for("flow-grpo", "training.updates_per_iteration=2"), rewards=one_reward(rising))
    next(trainer.iterations())
    assert trainer.steps == 2


@pytest.mark.slow
def test_dgpo_learns(small_config: RunConfig) -> None:
    """A short run of the shipped preset raises the held-out reward of the averaged weights."""
    config = load_config(
        "shapes-unguided",
        ["model.precision=fp32", "training.iterations=12", "training.decay=none", "evaluation.images=128"],
    )
    trainer = build_trainer(config)
    before = trainer.held_out_reward().value
    for _ in trainer.iterations():
        pass
    assert trainer.held_out_reward().value > before + 0.02


@needs_bf16
@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ["dgpo", "flow-grpo-fast"])
def test_gradients_in_bf16_point_where_those_in_float32_do(algorithm: str) -> None:
    """The same pictures and adapter; what must be float32 (errors, log-probabilities, advantages) is in both.

    Nothing is clipped: a trajectory sampled in the one precision has probability ratios off 1 in the other.
    """
    config = config_for(algorithm, "algorithm.clip=10")
    found, rollout, advantages = [], None, None
    for precision in ("fp32", "bf16"):
        model = load_model(ModelConfig(path="shapes", max_sequence_length=1, precision=precision))
        policy = spread(Policy(model, LoraConfig(rank=4, alpha=8), seed=0))
        if rollout is None:
            rollout, advantages = rollout_and_advantages(config, policy)
        else:
            encoded = model.encode(["a red circle", "two blue squares"])
            rollout = replace(rollout, conditioning=encoded[rollout.sample_ids // 4])
        assert advantages is not None
        slopes = gradients(config, policy, rollout, advantages.float())
        assert all(slope.dtype == torch.float32 for slope in slopes)
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    assert torch.nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.98
