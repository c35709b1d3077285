"""Diffusion-DPO held against its formula in float64, against DGPO, and against itself in other pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dgpo_plugin.algorithms import Layout, Random, Rollout
from dgpo_plugin.algorithms.diffusion_dpo import (
    DiffusionDPO,
    best_and_worst,
    diffusion_dpo_loss,
    pair_signs,
    pairs_of,
    preference_score,
    ranked_right,
)
from dgpo_plugin.algorithms.flow_times import drawn_levels
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.samplers.ode import shifted_levels
from tests.dgpo_plugin.algorithm_cases import config_for, in_float64, make_algorithm, whole_batch

pytestmark = pytest.mark.fast

TEXTS = ["a red circle", "two blue squares", "a green triangle"]
CPU = torch.device("cpu")
BETA = 100.0


def pictures(config: RunConfig, policy: Policy, texts: list[str] = TEXTS) -> Rollout:
    """Pairs of made-up latents, float64."""
    batch = whole_batch(config, policy, texts, 2)
    drawn = torch.randn(len(batch.sample_ids), *policy.model.latent_shape, generator=torch.Generator().manual_seed(3))
    return Rollout(batch.sample_ids, batch.conditioning, drawn.double(), batch.sigmas, batch.layout)


def gradient(algorithm: Any, rollout: Rollout, advantages: Tensor) -> tuple[list[Tensor], dict[str, float]]:
    parameters = algorithm.policy.parameters.values()
    for parameter in parameters:
        parameter.grad = None
    logged = algorithm.gradient(rollout, advantages, Random(0, 0))
    return [parameter.grad.clone() for parameter in parameters], logged


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    scale = max(float(slope.abs().max()) for slope in wanted)
    assert scale > 1e-8
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


# ---- the loss


def test_the_loss_is_the_papers_to_1e_10_gradient_too() -> None:
    generator = torch.Generator().manual_seed(0)
    error, reference = (torch.rand(5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    error.requires_grad_()
    score = preference_score(error, reference, pair_signs(5, CPU).double(), BETA)
    (own,) = torch.autograd.grad(diffusion_dpo_loss(score).mean(), error)
    wins, losses = error[:, 0] - reference[:, 0], error[:, 1] - reference[:, 1]
    formula = -torch.log(1 / (1 + torch.exp(BETA / 2 * (wins - losses)))).mean()
    (theirs,) = torch.autograd.grad(formula, error)
    assert float(abs(diffusion_dpo_loss(score).mean() - formula)) < 1e-10
    torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10)


def test_accuracy_begins_at_one_half() -> None:
    assert ranked_right(torch.tensor([-3.0, 0.0, 2.0])).tolist() == [1.0, 0.5, 0.0]


def test_a_whole_update_is_the_formula_pair_by_pair(policy: Policy) -> None:
    """Each pair at its own flow time, both pictures with one noise, the mean over pairs and times."""
    in_float64(policy)
    config = config_for("diffusion-dpo")
    rollout, algorithm = pictures(config, policy), make_algorithm(config, policy)
    found, logged = gradient(algorithm, rollout, pair_signs(3, CPU).double())

    levels, draw, total = policy.model.training_sigmas(), Random(0, 0), torch.zeros((), dtype=torch.float64)
    right, margins = 0.0, 0.0
    for parameter in policy.parameters.values():
        parameter.grad = None
    for number in range(2):
        for pair in range(3):
            u = 1 / (1 + math.exp(-float(draw.noise((), "timesteps", number, pair))))
            s = levels[int(1000 * u)]
            noise = draw.noise(policy.model.latent_shape, "training noise", number, pair).double()[None]
            errors = []
            for row in (2 * pair, 2 * pair + 1):
                clean, text = rollout.latents[row : row + 1], rollout.conditioning[[row]]
                noisy, target = (1 - s) * clean + s * noise, noise - clean
                with torch.no_grad(), policy.as_reference():
                    base = (policy.velocity(noisy, s, text) - target).square().mean()
                errors.append((policy.velocity(noisy, s, text) - target).square().mean() - base)
            bracket = BETA / 2 * (errors[0] - errors[1])
            total = total + torch.log(1 + torch.exp(bracket)) / 6
            right, margins = right + float(bracket < 0) / 6, margins - float(bracket) / 6
    total.backward()
    close(found, [p.grad for p in policy.parameters.values()], 1e-10)  # type: ignore[misc]
    assert logged["loss"] == pytest.approx(float(total), rel=1e-5)
    assert logged["preference_accuracy"] == pytest.approx(right)
    assert logged["preference_margin"] == pytest.approx(margins, rel=1e-4)


def test_before_the_first_step_every_pair_is_undecided(policy: Policy) -> None:
    for name, parameter in policy.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    config = config_for("diffusion-dpo")
    rollout = pictures(config, policy)
    _, logged = gradient(make_algorithm(config, policy), rollout, pair_signs(3, CPU))
    assert logged["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["preference_accuracy"] == 0.5
    assert logged["velocity_growth"] == 0


# ---- in other pieces


def test_neither_micro_batches_nor_processes_change_the_gradient(policy: Policy) -> None:
    in_float64(policy)
    config = config_for("diffusion-dpo")
    rollout = pictures(config, policy, [*TEXTS, "a blue square"])
    signs = pair_signs(4, CPU).double()
    algorithm = make_algorithm(config, policy)
    whole, logged = gradient(algorithm, rollout, signs)
    for size, passes in ((1, 1), (2, 0), (3, 1), (4, 0)):
        algorithm.micro_batch_size = size
        found, told = gradient(algorithm, rollout, signs)
        close(found, whole, 1e-9)
        assert told["group_pass"] == passes
        assert told["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    for parameter in policy.parameters.values():
        parameter.grad = None
    for rank in range(2):
        processes = Silent(rank, 2)
        part = make_algorithm(config, policy, processes)
        part.micro_batch_size = 2
        part.gradient(rollout.select(rollout.layout.share(processes)), signs, Random(0, 0))
    close([p.grad for p in policy.parameters.values()], whole, 1e-9)  # type: ignore[misc]


class Silent(Processes):
    """One of several that hears nothing of the others, as none has to where no pair is cut."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def test_levels_are_drawn_by_group_whoever_has_it() -> None:
    layout, levels = Layout(4, 2), shifted_levels(3.0)
    whole = drawn_levels(levels, layout, torch.arange(8), 2, Random(0, 5), logit_normal=True)
    part = drawn_levels(levels, layout, torch.tensor([4, 5]), 2, Random(0, 5), logit_normal=True)
    assert [time.sigma for time in part] == [time.sigma for time in whole]
    assert [time.rows.tolist() for time in part if time.rows is not None] == [[], [], [0, 1], []] * 2
    assert len({time.sigma for time in whole}) == 8


def test_levels_are_logit_normal_or_uniform() -> None:
    layout, levels = Layout(2000, 1), shifted_levels(1.0)
    for logit_normal, share in ((True, 0.7267), (False, 0.5)):  # P(1/4 < sigmoid(z) < 3/4) = P(|z| < log 3)
        drawn = drawn_levels(levels, layout, torch.arange(0), 1, Random(1, 0), logit_normal=logit_normal)
        middle = sum(0.25 < time.sigma < 0.75 for time in drawn) / 2000
        assert middle == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_levels_are_those_of_the_scheduler_as_it_is_loaded(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(torch.tensor(shifted_levels(shift)), scheduler.sigmas[:1000], rtol=1e-6, atol=1e-7)


# ---- DGPO and online pairs


def test_dgpo_with_groups_of_two_is_diffusion_dpo(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without clip and KL term, on one flow time, with advantages +-a: beta times a there, and divided by beta here."""
    in_float64(policy)
    one_step = ["algorithm.timesteps=1", "algorithm.noisiest_steps=1", "algorithm.clip=null"]
    dgpo = config_for("dgpo", *one_step, "algorithm.kl_weight=0", "algorithm.reference_guidance=1", "algorithm.beta=40")
    rollout, a = pictures(dgpo, policy), 2.5
    theirs, told = gradient(make_algorithm(dgpo, policy), rollout, a * pair_signs(3, CPU).double())
    # The same flow time under the same number, by which the noise is drawn.
    monkeypatch.setattr(policy.model, "training_sigmas", lambda: [rollout.sigmas[0]])
    own = config_for("diffusion-dpo", f"algorithm.beta={40 * a}", "algorithm.timesteps=1")
    found, _ = gradient(make_algorithm(own, policy), rollout, pair_signs(3, CPU).double())
    close(found, [40 * slope for slope in theirs], 1e-7)  # the embedding of times is float32, and rounds by batch
    assert 0 < told["group_weight"] < 1


def test_the_best_is_set_against_the_worst() -> None:
    advantages = torch.tensor([[0.5, 2.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 1.0, 1.0, -3.0]])
    signs = best_and_worst(advantages)
    assert signs.tolist() == [[0, 1, -1, 0], [0, 0, 0, 0], [-1, 1, 0, 0]]


def test_online_dpo_is_diffusion_dpo_on_its_groups_pairs(policy: Policy) -> None:
    in_float64(policy)
    online = config_for("online-dpo")
    batch = whole_batch(online, policy, TEXTS, 4)
    latents = torch.randn(12, *policy.model.latent_shape, generator=torch.Generator().manual_seed(1)).double()
    rollout = Rollout(batch.sample_ids, batch.conditioning, latents, batch.sigmas, batch.layout)
    advantages = torch.tensor([[0.5, 2, -1, 0], [-2, 1, 0, 0.5], [0, 0, 0, 0]], dtype=torch.float64)
    found, told = gradient(make_algorithm(online, policy), rollout, advantages)

    rows = torch.tensor([1, 2, 5, 4])
    ids = torch.arange(4)
    pairs = Rollout(ids, batch.conditioning[rows], latents[rows], batch.sigmas, Layout(3, 2))
    signs = torch.cat([pair_signs(2, CPU), torch.zeros(1, 2)]).double()
    wanted, logged = gradient(make_algorithm(config_for("diffusion-dpo"), policy), pairs, signs)
    close(found, wanted, 1e-12)
    assert told == pytest.approx(logged)
    own, own_signs = pairs_of(rollout, best_and_worst(advantages))
    assert own.sample_ids.tolist() == ids.tolist()
    assert torch.equal(own_signs, signs)


def test_what_a_plan_says_is_what_is_evaluated(policy: Policy) -> None:
    for size, own in ((None, 8), (1, 10)):  # two flow times: three for the gradient, the base's, perhaps a first one
        config = config_for("diffusion-dpo", f"training.micro_batch_size={size or 'null'}")
        with policy.counting() as spent:
            make_algorithm(config, policy).gradient(pictures(config, policy), pair_signs(3, CPU), Random(0, 0))
        assert DiffusionDPO.cost(config).training == own
        assert spent.total == own * 6
