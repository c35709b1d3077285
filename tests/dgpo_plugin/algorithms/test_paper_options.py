"""What DGPO's paper has and its released code has not: continuous flow times and text dropout."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dgpo_plugin.algorithms import Layout, Random, Rollout
from dgpo_plugin.algorithms.dgpo import DGPO, DGPOConfig
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy
from tests.conftest import SMALL
from tests.dgpo_plugin.algorithm_cases import config_for, in_float64, make_algorithm, rollout_and_advantages

pytestmark = pytest.mark.fast

EMPTY = -1.0
SIGMAS = [0.9, 0.7, 0.4, 0.0]


def fake_policy() -> SimpleNamespace:
    """What DGPO asks of a policy before any pass."""
    model = SimpleNamespace(error_weight=lambda sigma: 1.0)
    unconditional = Conditioning({"context": torch.full((1, 1), EMPTY)})
    return SimpleNamespace(model=model, unconditional=unconditional, copy_weights=dict)


def algorithm_for(**options: float) -> DGPO:
    config = DGPOConfig(timesteps=2, noisiest_steps=2, **options)
    return DGPO(config, fake_policy(), Processes(), None)  # type: ignore[arg-type]


def times(algorithm: DGPO, iteration: int, seed: int = 0) -> dict[int, float]:
    drawn = algorithm.flow_times(fake_rollout(1, 2), Random(seed, iteration))
    assert all(time.rows is None for time in drawn)  # the same for every sample
    return {time.number: time.sigma for time in drawn}


def fake_rollout(groups: int, size: int) -> Rollout:
    layout = Layout(groups, size)
    ids = torch.arange(layout.samples)
    table = Conditioning({"context": torch.arange(groups).float()[:, None]})
    return Rollout(ids, table[layout.groups_of(ids)], torch.zeros(len(ids), 2), SIGMAS, layout)


def texts(algorithm: DGPO, rollout: Rollout, random: Random, number: int = 0) -> list[float]:
    noised = algorithm.noised(rollout, number, 0.7, random)
    return noised.conditioning.tensors["context"].flatten().tolist()


# ---- flow times


def test_flow_times_are_uniform_between_t_min_and_the_rollouts_start() -> None:
    algorithm = algorithm_for(t_min=0.5)
    drawn = [list(times(algorithm, iteration).values()) for iteration in range(1000)]
    assert all(len(pair) == 2 for pair in drawn)
    for some in (*zip(*drawn, strict=True), [a for pair in drawn for a in pair]):
        assert 0.5 < min(some) < max(some) <= SIGMAS[0]
        assert stats.kstest(some, stats.uniform(0.5, SIGMAS[0] - 0.5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(np.array(drawn).T)[0, 1]) < 4 / math.sqrt(1000)
    assert times(algorithm, 3) == times(algorithm, 3)
    assert times(algorithm, 3) != times(algorithm, 3, seed=1)


def test_without_t_min_they_are_the_samplers_steps() -> None:
    for iteration in range(20):
        assert times(algorithm_for(), iteration) == {0: SIGMAS[0], 1: SIGMAS[1]}


def test_a_t_min_that_the_rollout_never_reaches_is_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm.t_min 0.95: the rollout starts at 0.9000; set it lower"):
        times(algorithm_for(t_min=0.95), 0)


def test_noisiest_steps_has_no_say_beside_t_min() -> None:
    plain = [setting for setting in SMALL if not setting.startswith("algorithm.")]
    few = ["algorithm.timesteps=6", "algorithm.noisiest_steps=5", "rollout.steps=4"]
    algorithm = load_config("shapes", [*plain, *few, "algorithm.t_min=0.3"]).algorithm
    assert isinstance(algorithm, DGPOConfig)
    assert algorithm.timesteps == 6
    with pytest.raises(UserError, match="noisiest_steps"):
        load_config("shapes", [*plain, *few])


# ---- text dropout


def test_the_share_of_groups_is_the_one_asked_for_and_drawn_for_each_timestep() -> None:
    algorithm, rollout, share = algorithm_for(text_dropout=0.2), fake_rollout(10, 3), 0.2
    lost = np.zeros((200, 2, 10))
    for iteration in range(200):
        for number in range(2):
            seen = np.array(texts(algorithm, rollout, Random(0, iteration), number)).reshape(10, 3)
            # A whole group or none of it, and each kept group its own text.
            assert ((seen == seen[:, :1]) & ((seen == EMPTY) | (seen == np.arange(10)[:, None]))).all()
            lost[iteration, number] = seen[:, 0] == EMPTY
    assert lost.mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / lost.size))
    both = (lost[:, 0] * lost[:, 1]).mean()  # independent between timesteps, so the square of it
    assert both == pytest.approx(share**2, abs=4 * math.sqrt(share**2 / 2000))


def test_without_dropout_the_conditioning_is_the_rollouts_own() -> None:
    rollout = fake_rollout(3, 2)
    assert algorithm_for().noised(rollout, 0, 0.7, Random(0, 0)).conditioning is rollout.conditioning


def test_a_processs_share_loses_the_same_texts() -> None:
    algorithm, rollout, draw = algorithm_for(text_dropout=0.5), fake_rollout(8, 3), Random(0, 1)
    whole = texts(algorithm, rollout, draw)
    assert 0 < whole.count(EMPTY) < len(whole)
    for rank in range(4):
        assert texts(algorithm, rollout.select(torch.arange(rank, 24, 4)), draw) == whole[rank::4]
    assert texts(algorithm, rollout.select(torch.arange(0)), draw) == []
    # One part of an iteration of several updates.
    assert texts(algorithm, replace(rollout.select(torch.arange(12, 24)), first_group=4), draw) == whole[12:]


# ---- the gradient


def velocity(policy: Policy, x: Tensor, sigma: float, text: Conditioning, guidance: float = 1.0) -> Tensor:
    """One image's, through the denoiser alone."""
    model = policy.model
    if guidance == 1:
        return model.velocity(x[None], sigma, text)[0]
    without = model.velocity(x[None], sigma, policy.unconditional)[0]
    return without + guidance * (model.velocity(x[None], sigma, text)[0] - without)


def oracle_gradient(
    config: RunConfig, policy: Policy, old: dict[str, Tensor], rollout: Rollout, advantages: Tensor, draw: Random
) -> list[Tensor]:
    """Image by image in float64, from the formulas of docs/architecture.md section 4."""
    algorithm = config.algorithm
    assert isinstance(algorithm, DGPOConfig)
    assert algorithm.t_min is not None
    assert algorithm.clip is not None
    groups, size = advantages.shape
    first, t_min = rollout.sigmas[0], algorithm.t_min
    loss = torch.zeros((), dtype=torch.float64)
    for number, u in enumerate(draw.uniform(algorithm.timesteps, "timesteps")):
        sigma = first - u * (first - t_min)
        for group in range(groups):
            lost = draw.uniform(1, "text dropout", number, group)[0] < algorithm.text_dropout
            noise = draw.noise(rollout.latents.shape[1:], "training noise", number, group).double()
            error, reference, kl, clipped = [], [], [], []
            for image in range(size):
                row = group * size + image
                text = policy.unconditional if lost else rollout.conditioning[[row]]
                clean, advantage = rollout.latents[row].double(), float(advantages[group, image])
                x, target = (1 - sigma) * clean + sigma * noise, noise - clean
                v = velocity(policy, x, sigma, text)
                with policy.as_reference():
                    base = velocity(policy, x, sigma, text, algorithm.reference_guidance)
                with policy.with_weights(old):
                    before = velocity(policy, x, sigma, text)
                error.append((target - v).square().mean())
                reference.append((target - base).square().mean())
                kl.append((v - base).square().mean())
                ratio = math.exp((target - before).square().mean().item() - error[-1].item())
                clipped.append(ratio > 1 + algorithm.clip if advantage > 0 else ratio < 1 - algorithm.clip)
            score = sum(
                a * (e.item() - r.item()) for a, e, r in zip(advantages[group].tolist(), error, reference, strict=True)
            )
            weight = 1 / (1 + math.exp(-algorithm.beta / size * score))
            for a, e, k, out in zip(advantages[group].tolist(), error, kl, clipped, strict=True):
                loss = loss + weight * a * (e.detach() if out else e) + algorithm.kl_weight * k
    mean = loss / (algorithm.timesteps * groups * size)
    return list(torch.autograd.grad(mean, list(policy.parameters.values())))


@pytest.mark.parametrize("size", [None, 3])
def test_the_gradient_is_that_of_the_formulas(policy: Policy, size: int | None) -> None:
    settings = ["algorithm.t_min=0.4", "algorithm.text_dropout=0.5", "algorithm.clip=0.0001", "algorithm.kl_weight=0.5"]
    settings += ["algorithm.reference_guidance=2", f"training.micro_batch_size={size or 'null'}"]
    config = config_for("dgpo", *settings)
    in_float64(policy)
    rollout, advantages = rollout_and_advantages(config, policy)
    draw = Random(0, 2)
    lost = {(n, g): draw.uniform(1, "text dropout", n, g)[0] < 0.5 for n in range(2) for g in range(2)}
    assert len(set(lost.values())) == 2  # some lose their text and some do not
    algorithm = make_algorithm(config, policy)
    assert isinstance(algorithm, DGPO)
    algorithm.after_step(3)
    for old in algorithm.old_weights.values():
        old.mul_(0.9)
    expected = oracle_gradient(config, policy, algorithm.old_weights, rollout, advantages, draw)
    for parameter in policy.parameters.values():
        parameter.grad = None
    logged = algorithm.gradient(rollout, advantages, draw)
    assert 0 < logged["clip_fraction"] < 1
    for parameter, slope in zip(policy.parameters.values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-6, atol=1e-10)
