"""With keep_graphs the rollout's own passes are differentiated: the same gradient, for a forward less of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Batch, Random
from dgpo_plugin.algorithms.rollout import join, micro_batches
from dgpo_plugin.algorithms.trajectories import TrajectoryRollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models import load_model
from dgpo_plugin.models.attention import checkpoint_blocks
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import load_checkpoint, save_checkpoint
from dgpo_plugin.training.identity import RunIdentity, check_same_run
from dgpo_plugin.training.plan import GRAPHS, MemoryCount, make_plan
from dgpo_plugin.training.progress import iteration_line
from dgpo_plugin.training.run import progress_of
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import one_reward
from tests.dgpo_plugin.algorithm_cases import (
    TRAJECTORY,
    config_for,
    in_float64,
    make_algorithm,
    mean_and_std,
    whole_batch,
)

pytestmark = pytest.mark.fast

KEEP = "algorithm.keep_graphs=true"
TEXTS = ["a red circle", "two blue squares", "a green triangle"]
GROUPS, SIZE, STEPS = 3, 4, 3
"""Three of the four steps are trained, in each of the algorithms."""
LEVEL = {"flow-grpo-fast": 0.8}
EVALUATIONS = ("rollout_evaluations", "kept_evaluations", "differentiated_evaluations", "denoiser_evaluations")


def drawn(*zeros: tuple[int, int]) -> Tensor:
    """Advantages (P, G), 0 at some places."""
    advantages = torch.randn(GROUPS, SIZE, generator=torch.Generator().manual_seed(1))
    for place in zeros:
        advantages[place] = 0
    return advantages


SOME_DROPPED = drawn((0, 2), *((1, n) for n in range(SIZE)), (2, 0))
"""Of micro-batches of four the second moves nothing at all, the others lack an image each."""


def sampled(config: RunConfig, policy: Policy, share: Tensor | None = None) -> TrajectoryRollout:
    """A process's samples of an iteration, as the trainer has them: micro-batches joined, made an update's."""
    algorithm, whole = make_algorithm(config, policy), whole_batch(config, policy, TEXTS, SIZE)

    def batch(ids: Tensor) -> Batch:
        return replace(whole, sample_ids=ids, conditioning=whole.conditioning[ids])

    ids = whole.sample_ids if share is None else share
    parts = [
        algorithm.sample(batch(part), Random(0, 0)) for part in micro_batches(ids, config.training.micro_batch_size)
    ]
    (_, rollout), *others = join(parts).per_update(1)
    assert not others
    return rollout


def gradient(
    config: RunConfig, policy: Policy, advantages: Tensor, ranks: tuple[Processes, ...] = (Processes(),)
) -> tuple[list[Tensor], dict[str, float]]:
    """The sum of the processes' gradients after one iteration, and what the last of them logs."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    logged: dict[str, float] = {}
    for processes in ranks:
        rollout = sampled(config, policy, processes.share(GROUPS * SIZE))
        assert bool(rollout.graphs) == config.algorithm.keep_graphs  # type: ignore[attr-defined]
        logged = make_algorithm(config, policy, processes).gradient(rollout, advantages, Random(0, 0))
    return [parameter.grad.clone() for parameter in policy.parameters.values()], logged  # type: ignore[union-attr]


class Silent(Processes):
    """One of several that hears nothing of the others."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize(("guidance", "size"), [(1, "5"), (3, "null")])
@pytest.mark.parametrize("name", TRAJECTORY)
def test_in_the_same_batches_it_is_the_same_to_the_bit(policy: Policy, name: str, guidance: int, size: str) -> None:
    settings = [f"algorithm.guidance={guidance}", "algorithm.kl_weight=0.3", f"training.micro_batch_size={size}"]
    twice, logged = gradient(config_for(name, *settings), policy, drawn())
    once, logged_once = gradient(config_for(name, *settings, KEEP), policy, drawn())
    assert all(torch.equal(a, b) for a, b in zip(twice, once, strict=True))
    assert max(float(slope.abs().max()) for slope in once) > 0
    assert logged_once == logged
    assert (logged_once["ratio"], logged_once["ratio_deviation"]) == (1, 0)


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("name", TRAJECTORY)
def test_the_gradient_is_that_of_the_formulas_in_float64(policy: Policy, name: str, guidance: int) -> None:
    """On-policy every ratio is 1, and its gradient that of the log-probability; images of advantage 0 are left out."""
    in_float64(policy)
    settings = [f"algorithm.guidance={guidance}", "algorithm.kl_weight=0.2", "training.micro_batch_size=4"]
    config = config_for(name, *settings, KEEP)
    rollout, own = sampled(config, policy), SOME_DROPPED.double().flatten()
    kind, total = "cps" if name == "flow-grpo-fast" else "flow-sde", torch.zeros((), dtype=torch.float64)
    moving = [row for row in range(len(own)) if own[row] != 0]
    for row in moving:
        for index, step in enumerate(rollout.steps):
            x, text = rollout.noisy_latents[row : row + 1, index], rollout.conditioning[[row]]
            s, after = rollout.sigmas[step], rollout.sigmas[step + 1]
            level = LEVEL.get(name, 0.7)
            v = policy.velocity(x, s, text, guidance)
            # GARDO's reference is the policy as it was, which it is here.
            as_it_was = policy.with_weights(policy.copy_weights())
            with as_it_was if name == "flow-grpo-gardo" else policy.as_reference():
                base = policy.velocity(x, s, text, guidance)
            mean, std = mean_and_std(kind, x, v, rollout.sigmas, step, level)
            base_mean, _ = mean_and_std(kind, x, base, rollout.sigmas, step, level)
            scale, diffusion = (1.0, std) if kind == "cps" else (2 * std**2, std / (s - after) ** 0.5)
            log_probability = -((rollout.next_latents[row, index] - mean) ** 2).mean() / scale
            factor = std / (s - after) if name == "flow-grpo-guard" else 1.0
            kl = ((mean - base_mean) ** 2).mean() / (2 * diffusion**2)
            total = total - own[row] * factor * log_probability + 0.2 * kl
    expected = torch.autograd.grad(total / (len(moving) * STEPS), list(policy.parameters.values()))
    found, _ = gradient(config, policy, SOME_DROPPED.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", TRAJECTORY)
def test_neither_micro_batches_nor_processes_change_it(policy: Policy, name: str) -> None:
    in_float64(policy)
    advantages = SOME_DROPPED.double()
    twice, _ = gradient(config_for(name), policy, advantages)
    ranks = (Silent(0, 2), Silent(1, 2))
    for size, processes in ((None, (Processes(),)), (5, (Processes(),)), (2, ranks)):
        config = config_for(name, KEEP, f"training.micro_batch_size={size or 'null'}")
        for a, b in zip(gradient(config, policy, advantages, processes)[0], twice, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("guidance", [1, 3])
def test_a_backward_counts_where_it_is_done(policy: Policy, guidance: int) -> None:
    """A micro-batch of which nothing moves is not differentiated, unless all processes have to keep step."""
    settings = ["training.micro_batch_size=4", f"algorithm.guidance={guidance}", "algorithm.kl_weight=0", KEEP]
    config, passes = config_for("flow-grpo", *settings), 1 if guidance == 1 else 2
    for lockstep, batches in ((False, 2), (True, 3)):
        with policy.counting() as every:
            with policy.counting() as sampling:
                rollout = sampled(config, policy)
            algorithm = make_algorithm(config, policy, Processes(lockstep=lockstep))
            algorithm.gradient(rollout, SOME_DROPPED, Random(0, 0))
        forwards = passes * STEPS * 4 * batches
        assert (sampling.total, sampling.differentiated) == (passes * 4 * GROUPS * SIZE, 0)
        assert every.kept == forwards
        assert every.differentiated == 3 * forwards
        assert every.total == sampling.total + 2 * forwards


def moving(images: Tensor, prompts: object) -> Tensor:
    """No image is exactly its group's mean, and every picture has its say."""
    return torch.arange(len(images)).float() + images.mean((1, 2, 3))


def trained(name: str, *settings: str) -> tuple[Trainer, list[dict[str, float]]]:
    config = config_for(name, "training.micro_batch_size=4", "algorithm.kl_weight=0.1", *settings)
    trainer = build_trainer(config, rewards=one_reward(moving))
    return trainer, list(trainer.iterations())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flow-grpo", []),
        ("flow-grpo-fast", ["algorithm.guidance=2"]),
        ("flow-dppo", ["training.gradient_checkpointing=true", "model.offload=true"]),
    ],
)
def test_a_run_trains_the_same_adapter_and_counts_a_forward_less(name: str, settings: list[str]) -> None:
    (twice, before), (once, after) = trained(name, *settings), trained(name, *settings, KEEP)
    weights, found = twice.policy.copy_weights(), once.policy.copy_weights()
    assert all(torch.equal(weights[key], found[key]) for key in weights)
    for record, kept in zip(before, after, strict=True):
        same = record.keys() - {key for key in record if key.endswith("seconds")} - {*EVALUATIONS}
        assert {key: record[key] for key in same} == {key: kept[key] for key in same}
        forwards = record["differentiated_evaluations"] / 3
        assert [kept[key] - record[key] for key in EVALUATIONS] == [0, forwards, 0, -forwards]
    cost = once.algorithm.cost(once.config)
    assert after[-1]["denoiser_evaluations"] == 8 * (cost.sampling + cost.training)
    assert after[-1]["rollout_evaluations"] == 8 * cost.sampling
    line = iteration_line(after[-1], once.algorithm.METRICS)
    assert f"graphs kept of {after[-1]['kept_evaluations']:.0f} passes" in line
    assert "kept" not in iteration_line(before[-1], twice.algorithm.METRICS)


def test_a_restored_trainer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = config_for("flow-grpo", KEEP, "training.iterations=4")
    identity = RunIdentity(config=config.model_dump(mode="json"), prompts_sha256="p", packages={})
    whole = build_trainer(config)
    records = whole.iterations()
    for _ in range(2):
        next(records)
    path = save_checkpoint(tmp_path, identity, progress_of(whole), whole.state(), keep=1)
    list(records)
    again, back = build_trainer(config), load_checkpoint(path)
    again.restore(back.tensors, back.progress.iteration, back.progress.steps)
    list(again.iterations())
    weights, found = whole.policy.copy_weights(), again.policy.copy_weights()
    assert all(torch.equal(weights[key], found[key]) for key in weights)
    computed = config_for("flow-grpo", "training.iterations=4")
    other = RunIdentity(config=computed.model_dump(mode="json"), prompts_sha256="p", packages={})
    with pytest.raises(UserError, match="algorithm.keep_graphs is False, but .* was trained with True"):
        check_same_run(back.identity, other, path, 2)


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm.guidance=2"],
        ["training.micro_batch_size=5"],
        ["training.gradient_checkpointing=true", "training.micro_batch_size=4"],
    ],
)
def test_as_much_memory_is_planned_as_they_take(settings: list[str]) -> None:
    config = config_for("flow-grpo", KEEP, f"training.prompts_per_iteration={GROUPS}", *settings)
    policy = Policy(load_model(config.model), config.lora, seed=0)
    if config.training.gradient_checkpointing:
        checkpoint_blocks(policy.model.denoiser)
    with MemoryCount() as count:
        count.leave_out(policy.model.denoiser)
        rollout = sampled(config, policy)
        before = count.alive
        rollout = replace(rollout, graphs=())
        taken = before - count.alive
    assert len(rollout.sample_ids) == GROUPS * SIZE
    planned = make_plan(config).weights[GRAPHS]
    assert 0.75 * planned < taken <= planned


@pytest.mark.parametrize("name", TRAJECTORY)
def test_several_updates_of_a_rollout_are_refused(name: str) -> None:
    """From the second on the policy is not the one that sampled."""
    with pytest.raises(UserError, match=r"training.updates_per_iteration \(2\) must be 1 for algorithm.keep") as caught:
        config_for(name, KEEP, "training.updates_per_iteration=2")
    assert "\n" not in str(caught.value)


def test_other_algorithms_have_no_such_switch() -> None:
    with pytest.raises(UserError, match="keep_graphs"):
        config_for("dgpo", KEEP)
