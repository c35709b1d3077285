"""Every family on a tiny random pipeline of its real classes: the same latents, the same adapter, as diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms.dgpo import matching_error
from dgpo_plugin.config import LoraConfig, ModelConfig, RunConfig
from dgpo_plugin.config_files import parse_config
from dgpo_plugin.errors import UserError
from dgpo_plugin.export import apply_adapter, export_adapter, read_adapter
from dgpo_plugin.lora import Policy
from dgpo_plugin.models import load_model
from dgpo_plugin.plan import make_plan
from dgpo_plugin.sampling import fixed_noise, sample_latents
from dgpo_plugin.trainer import Trainer
from tests.conftest import spread
from tests.dgpo_plugin.families import FAMILIES, Family

pytestmark = pytest.mark.fast

PROMPTS = ["a red circle", "two blue squares and a triangle"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    chosen = FAMILIES[request.param]
    torch.manual_seed(0)
    chosen.build(folder)
    return chosen, folder


def settings(family: Family, folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), resolution=family.resolution, max_sequence_length=family.tokens)


@pytest.mark.parametrize("guided", [False, True])
def test_latents_are_the_pipelines(family: tuple[Family, Path], guided: bool) -> None:
    chosen, _ = family
    model = load_model(settings(*family))
    noise = fixed_noise(model, range(2), 0)
    guidance = chosen.guidance if guided else 1.0
    ours = sample_latents(model, PROMPTS, noise, 4, guidance)
    theirs = chosen.call(load_model(settings(*family)).pipeline, PROMPTS, noise, 4, guidance)
    assert ours.shape == noise.shape
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[0], ours[1])


def test_pictures_have_the_size_asked_for(family: tuple[Family, Path]) -> None:
    chosen, _ = family
    model = load_model(settings(*family))
    pictures = model.decode(fixed_noise(model, range(1), 0))
    assert pictures.shape == (1, 3, chosen.resolution, chosen.resolution)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_training_lowers_the_matching_error(family: tuple[Family, Path]) -> None:
    policy = Policy(load_model(settings(*family)), LoraConfig(rank=4, alpha=8), seed=0)
    model = policy.model
    asked, clean, sigma = model.encode(PROMPTS), fixed_noise(model, range(2), 0), 0.7
    noise = fixed_noise(model, range(2, 4), 0)
    noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-2)
    errors = []
    for _ in range(6):
        error = matching_error(policy.velocity(noisy, sigma, asked), target).mean()
        errors.append(error.item())
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < errors[0]
    trainable = {name for name, p in model.denoiser.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.denoiser.named_parameters() if ".lora_" in name}


def test_the_adapter_is_the_pipelines_too(family: tuple[Family, Path], tmp_path: Path) -> None:
    """load_lora_weights gives exactly the policy's pictures, and every tensor is used."""
    chosen, _ = family
    policy = Policy(load_model(settings(*family)), LoraConfig(rank=4, alpha=8), seed=0)
    spread(policy, 0.2)
    path = tmp_path / "adapter.safetensors"
    config = RunConfig(model=settings(*family), lora=LoraConfig(rank=4, alpha=8))
    export_adapter(policy, policy.copy_weights(), path, config, steps=1, reward_before=None, reward_after=None)
    noise = fixed_noise(policy.model, range(2), 0)
    with torch.no_grad():
        ours = sample_latents(policy.model, PROMPTS, noise, 4, 1.0)
    pipe: Any = load_model(settings(*family)).pipeline
    plain = chosen.call(pipe, PROMPTS, noise, 4, 1.0)
    pipe.load_lora_weights(str(path))
    theirs = chosen.call(pipe, PROMPTS, noise, 4, 1.0)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)
    assert (theirs - plain).abs().max() > 0.01
    merged = load_model(settings(*family))
    apply_adapter(merged, path)
    ours_merged = sample_latents(merged, PROMPTS, noise, 4, 1.0)
    torch.testing.assert_close(ours_merged, ours, rtol=1e-3, atol=1e-3)
    tensors, _ = read_adapter(path)
    loaded = [name for name, _ in getattr(pipe, policy.model.prefix).named_parameters() if ".lora_" in name]
    assert len(loaded) == len(tensors)


def test_the_plan_knows_its_parameters(family: tuple[Family, Path]) -> None:
    config = parse_config(
        {"model": settings(*family).model_dump(), "training": {"prompts_per_iteration": 1, "group_size": 2}}, "test"
    )
    plan = make_plan(config)
    denoiser = load_model(settings(*family)).denoiser
    assert plan.parameters == sum(p.numel() for p in denoiser.parameters())
    assert plan.phases["training"] > 0


def test_dgpo_runs(family: tuple[Family, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = parse_config(
        {
            "model": settings(*family).model_dump(),
            "lora": {"rank": 4, "alpha": 8},
            "prompts": {"train": str(tmp_path / "prompts.txt")},
            "rollout": {"steps": 4},
            "algorithm": {"name": "dgpo", "timesteps": 2, "noisiest_steps": 3, "rollout_guidance": 2},
            "training": {"prompts_per_iteration": 2, "group_size": 4, "iterations": 2, "micro_batch_size": 3},
        },
        "test",
    )

    def brightness(images: Tensor, prompts: object) -> Tensor:
        return images.mean((1, 2, 3))

    trainer = Trainer(config, reward=brightness)
    records = list(trainer.iterations())
    assert records[-1]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["sd15", "sd21-v"])
def test_the_matching_error_is_that_of_the_models_own_prediction(name: str, tmp_path: Path) -> None:
    """From the diffusion's own formulas: x_t = a x0 + s eps, and the target eps or a eps - s x0."""
    FAMILIES[name].build(tmp_path)
    model: Any = load_model(settings(FAMILIES[name], tmp_path))
    asked = model.encode(PROMPTS)
    clean, noise = fixed_noise(model, range(2), 0), fixed_noise(model, range(2, 4), 0)
    for step, sigma in enumerate(model.sigmas(5, None)[:-1]):
        timestep = [801, 601, 401, 201, 1][step]
        alpha = model.pipeline.scheduler.alphas_cumprod[timestep].item()
        a, s = alpha**0.5, (1 - alpha) ** 0.5
        assert sigma == pytest.approx(s / (a + s), rel=1e-6)
        with torch.no_grad():
            own = model.denoiser(a * clean + s * noise, timestep, asked.tensors["context"], return_dict=False)[0]
            velocity = model.velocity((1 - sigma) * clean + sigma * noise, sigma, asked)
        target = noise if name == "sd15" else a * noise - s * clean
        expected = (target - own).square().flatten(1).mean(1)
        ours = model.error_weight(sigma) * matching_error(velocity, noise - clean)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_another_pipeline_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        UserError, match=r"KandinskyPipeline is not supported; supported: .*FluxPipeline.*adding-a-model"
    ):
        load_model(ModelConfig(path=str(tmp_path)))


def test_unet_adapters_have_the_names_that_comfyui_reads(tmp_path: Path) -> None:
    """ComfyUI knows a U-Net's layers as lora_unet_<path with underscores>, or under no name that diffusers reads."""
    FAMILIES["sdxl"].build(tmp_path)
    policy = Policy(load_model(settings(FAMILIES["sdxl"], tmp_path)), LoraConfig(rank=4, alpha=8), seed=0)
    keys = [policy.model.adapter_key(name) for name in policy.names]
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in keys
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("lora_unet_") and key.count(".") == 2 for key in keys)
