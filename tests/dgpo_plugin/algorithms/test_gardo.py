"""GARDO: its rules in float64 against loops, the whole gradient, the moving reference, and what it refuses."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from dgpo_bench.task import Task
from dgpo_plugin.algorithms.base import Judged, Random
from dgpo_plugin.algorithms.flow_grpo_gardo import (
    FlowGRPOGardo,
    distinctness,
    held,
    next_share,
    ranks,
    uncertainty,
    varied,
)
from dgpo_plugin.algorithms.trajectories import TrajectoryRollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.config.load import load_config, reward_terms
from dgpo_plugin.config.places import absolute_places, lost_places, places_in
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.rewards.networks.features import PictureFeatures
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.contents import contents_of
from dgpo_plugin.training.plan import make_plan
from tests.conftest import SMALL
from tests.dgpo_plugin.algorithm_cases import (
    config_for,
    features_network,
    in_float64,
    make_algorithm,
    mean_and_std,
    rollout_and_advantages,
)

pytestmark = pytest.mark.fast

SCORES = st.lists(st.integers(0, 4), min_size=2, max_size=24)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variety_is_paid_for_where_a_picture_is_good() -> None:
    """Image by image, from the released code's rule."""
    features, advantages = drawn(3, 5, 7), drawn(3, 5, seed=1)
    found = varied(advantages, distinctness(features))
    for group in range(3):
        nearest = []
        for i in range(5):
            others = []
            for j in range(5):
                if i != j:
                    a, b = features[group, i].numpy(), features[group, j].numpy()
                    others.append(1 - float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))))
            nearest.append(min(others))
        for i in range(5):
            own = float(advantages[group, i])
            expected = own if own < 0 else own * nearest[i] / (sum(nearest) / 5)
            assert float(found[group, i]) == pytest.approx(expected, rel=1e-10)


def test_in_a_group_of_equal_pictures_nothing_is_paid_for() -> None:
    advantages = drawn(1, 4)
    assert torch.equal(varied(advantages, distinctness(torch.ones(1, 4, 3, dtype=torch.float64))), advantages)


@given(SCORES, st.data())
def test_who_is_held_back(trained: list[int], data: st.DataObject) -> None:
    """Against loops: mean ranks, 1 for the best, and the percentile of those that are not below 0."""
    others = [data.draw(st.lists(st.integers(0, 9), min_size=len(trained), max_size=len(trained))) for _ in range(2)]
    share = data.draw(st.floats(0.02, 0.2))

    def ranked(values: list[int]) -> list[float]:
        places = sorted(values, reverse=True)
        return [1 + places.index(v) + (places.count(v) - 1) / 2 for v in values]

    expected = [a - (b + c) / 2 for a, b, c in zip(ranked(trained), *map(ranked, others), strict=True)]
    found = uncertainty(torch.tensor(trained), torch.tensor(others).T)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    candidates = [value for value in expected if value >= 0]
    limit = np.percentile(candidates, 100 - 100 * share)
    near = [abs(value - limit) < 1e-9 for value in expected]
    gate = held(found, share).tolist()
    assert all(a == (value > limit) for a, value, tie in zip(gate, expected, near, strict=True) if not tie)
    order = data.draw(st.permutations(range(len(trained))))
    assert held(found[list(order)], share).tolist() == [gate[at] for at in order]


@given(SCORES)
def test_ranks_know_only_the_order(values: list[int]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(ranks(scores), ranks(torch.exp(scores) - 3))
    assert float(ranks(scores).sum()) == len(values) * (len(values) + 1) / 2


def test_the_share_follows_how_much_the_rewards_disagree() -> None:
    share, remembered, seen = 0.5, torch.full((20,), -1.0), list[float]()
    for mean in [3.0, 4.0, 5.0, 4.5, 2.0, 1.0, *[9.0 + i for i in range(30)], *[0.5 - i / 100 for i in range(40)]]:
        known = seen[-20:]
        if not known:
            expected = 0.1
        elif mean > max(known):
            expected = min(0.2, share * 1.1)
        elif mean < min(known):
            expected = max(0.02, share * 0.9)
        else:
            expected = share
        share = next_share(share, mean, remembered)
        assert share == pytest.approx(expected)
        seen.append(mean)
        remembered = torch.cat([remembered[1:], torch.tensor([mean])])
    assert share == 0.02


@pytest.mark.parametrize("gated", ["behind", "ahead"])
def test_the_gradient_is_that_of_the_formulas(policy: Policy, gated: str) -> None:
    """The KL term's mean is over those held back, from a copy; everything else is Flow-GRPO's."""
    in_float64(policy)
    config = config_for("flow-grpo-gardo", "algorithm.kl_weight=0.2", f"algorithm.gated={gated}", "algorithm.clip=1e-5")
    rollout, _ = rollout_and_advantages(config, policy)
    assert isinstance(rollout, TrajectoryRollout)
    algorithm: Any = make_algorithm(config, policy)
    for parameter in policy.parameters.values():
        parameter.data += 0.01 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).to(parameter))
    # The trained reward likes the first sample least, and the other likes it best; the last one the other way round.
    trained, other = torch.arange(8.0), torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 0])
    scores = torch.stack([trained, other], dim=1).double().view(2, 4, 2)
    advantages = algorithm.advantages(Judged(scores, torch.tensor([2.0, 0.0]).double(), "rewards"))
    centered = 2 * (scores[..., 0] - scores[..., 0].mean(1, keepdim=True))
    torch.testing.assert_close(advantages, centered.clamp(-5, 5))
    kept = 0 if gated == "behind" else 7
    terms, pulls = list[Tensor](), list[Tensor]()
    for row in range(8):
        for index, step in enumerate(rollout.steps):
            x, x_next, text = (
                rollout.noisy_latents[row, index],
                rollout.next_latents[row, index],
                rollout.conditioning[[row]],
            )
            s, after, a = rollout.sigmas[step], rollout.sigmas[step + 1], float(advantages.flatten()[row])
            v = policy.model.velocity(x[None], s, text)[0]
            with policy.with_weights(algorithm.reference_weights):  # which sampled, too
                then = policy.model.velocity(x[None], s, text)[0]
            mean, std = mean_and_std("flow-sde", x, v, rollout.sigmas, step, 0.7)
            old_mean, _ = mean_and_std("flow-sde", x, then, rollout.sigmas, step, 0.7)
            ratio = torch.exp((((x_next - old_mean) ** 2 - (x_next - mean) ** 2) / (2 * std**2)).mean())
            terms.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-5, 1 + 1e-5)))
            if row == kept:
                pulls.append(((mean - old_mean) ** 2).mean() / (2 * (std / math.sqrt(s - after)) ** 2))
    kl = torch.stack(pulls).mean()
    expected = torch.autograd.grad(torch.stack(terms).mean() + 0.2 * kl, list(policy.parameters.values()))
    # A later update than the first, whose own pass would be the old policy's.
    shifted = replace(rollout, sample_ids=rollout.sample_ids + 8, first_group=2, first_update=False)
    algorithm._held = torch.cat([~algorithm._held, algorithm._held])  # noqa: SLF001
    for size in (None, 3):
        algorithm.micro_batch_size = size
        for parameter in policy.parameters.values():
            parameter.grad = None
        logged = algorithm.gradient(shifted, advantages, Random(0, 4))
        assert logged["kl"] == pytest.approx(float(kl), rel=1e-9)
        assert (logged["held"], logged["reference_age"]) == (1 / 8, 4)
        for parameter, slope in zip(policy.parameters.values(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-11)


def test_the_reference_becomes_the_policy_when_it_is_old_or_far(policy: Policy) -> None:
    algorithm = make_algorithm(config_for("flow-grpo-gardo", "algorithm.renew_after=3"), policy)
    assert isinstance(algorithm, FlowGRPOGardo)

    def moved() -> bool:
        return any(not torch.equal(algorithm.reference_weights[n], p) for n, p in policy.parameters.items())

    renewed = []
    for iteration in range(9):
        for parameter in policy.parameters.values():
            parameter.data += 1e-3
        if iteration == 5:
            algorithm.state()["gate"]["due"].fill_(True)  # what an update does whose KL is above renew_above
        algorithm.after_iteration(iteration, iteration)
        if not moved():
            renewed.append(iteration)
    assert renewed == [3, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["algorithm.name=flow-grpo-gardo"],
            "configuration: rewards are all trained on: flow-grpo-gardo compares them with others",
        ),
        (
            ["algorithm.name=flow-grpo-gardo", "rewards={shapes: 0}"],
            "configuration: rewards have no weight but 0; nothing would be trained on",
        ),
        (
            ["algorithm.name=flow-grpo", "rewards={shapes: 1, sharpness: 0}"],
            "configuration: rewards.sharpness.weight must not be 0; leave",
        ),
        (["evaluation.rewards={shapes: 0}"], "shapes.weight must not be 0; leave the reward out instead"),
    ],
)
def test_rewards_that_it_has_no_use_for_are_refused(changes: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config("shapes", [each for each in SMALL if not each.startswith("algorithm.")] + changes)


def test_a_weight_of_0_is_refused_outside_of_runs_too() -> None:
    """In a task of the harness, and beside a run: nobody there has a use for one of weight 0."""
    with pytest.raises(UserError, match="brightness.weight must not be 0; leave the reward out instead"):
        reward_terms(["brightness"], ["rewards.brightness.weight=0"])
    with pytest.raises(ValidationError, match="red.weight must not be 0; leave the reward out instead"):
        Task.model_validate({"rewards": {"red": {"weight": 0}}})


def test_nothing_is_compared_without_a_kl_term() -> None:
    assert config_for("flow-grpo-gardo", "rewards={shapes: 1}", "algorithm.kl_weight=0").rewards["shapes"].weight == 1


# ---- what is seen in pictures


def test_features_are_those_of_the_networks_own_processor() -> None:
    from transformers import AutoModel, BitImageProcessorPil

    place = features_network("dinov2")
    image = (drawn(3, 300, 420).sigmoid() * 255).round().float()
    found = PictureFeatures(place, ScoringConfig()).features(image[None] / 255)
    side = 256 // 28 * 28
    processor = BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    )
    pixels = processor(Image.fromarray(image.byte().permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    expected = AutoModel.from_pretrained(place).eval()(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_another_network_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere \(algorithm.features\): cannot be loaded"):
        PictureFeatures(str(tmp_path / "nowhere"), ScoringConfig())
    from transformers import CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    CLIPVisionModel(CLIPVisionConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="is a clip_vision_model; give a DINOv2 or DINOv3 of transformers, or null"):
        PictureFeatures(str(tmp_path / "clip"), ScoringConfig())


def test_a_run_sees_its_pictures_and_is_planned_for() -> None:
    with_features = f"algorithm.features={features_network()}"
    trainer = build_trainer(config_for("flow-grpo-gardo", with_features))
    record = trainer.iterate(0)
    assert record["features_seconds"] > 0
    assert 0 <= record["held"] <= 1
    assert "features_seconds" not in build_trainer(config_for("flow-grpo-gardo")).iterate(0)
    weights = [sum(make_plan(config_for("flow-grpo-gardo", *more)).weights.values()) for more in ([], [with_features])]
    assert weights[1] - weights[0] == 4 * 303_129_600


def test_its_network_is_found_from_any_folder_and_known_by_its_content(tmp_path: Any, monkeypatch: Any) -> None:
    shutil.copytree(features_network(), tmp_path / "dino")
    monkeypatch.chdir(tmp_path)
    config = absolute_places(config_for("flow-grpo-gardo", "algorithm.features=dino"), tmp_path)
    assert config.algorithm.picture_network == str(tmp_path / "dino")
    assert places_in(config, tmp_path).algorithm.picture_network == "dino"
    found = contents_of(config, RewardSet({}))["algorithm.features"]
    (tmp_path / "dino" / "more.json").write_text("{}")
    assert contents_of(config, RewardSet({}))["algorithm.features"] != found
    assert lost_places(config) == {}
    (tmp_path / "dino").rename(tmp_path / "elsewhere")
    assert lost_places(config) == {"algorithm.features": str(tmp_path / "dino")}
