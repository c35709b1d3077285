"""Every family on a tiny random pipeline of its real classes: the same latents, the same adapter, as diffusers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dgpo_plugin.adapters.load import apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.algorithms.forward import matching_error
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import guided_velocity
from dgpo_plugin.models.base_identity import PartIdentity, compared_parts
from dgpo_plugin.models.families.noise_prediction import NoisePredictingModel
from dgpo_plugin.models.generate import fixed_noise, sample_latents
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.samplers.ode import sample_ode
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.plan import make_plan
from tests.conftest import one_reward, shapes_run, spread
from tests.dgpo_plugin.families import FAMILIES, Family

pytestmark = pytest.mark.fast

Size = tuple[int, int]
"""Width and height, in pixels."""
SQUARE, WIDE, HIGH = (32, 32), (64, 32), (32, 64)
PROMPTS = ["a red circle", "two blue squares and a triangle"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    chosen = FAMILIES[request.param]
    torch.manual_seed(0)
    chosen.build(folder)
    return chosen, folder


def settings(family: Family, folder: Path, size: Size | None = None) -> ModelConfig:
    width, height = size or (family.width, family.height)
    return ModelConfig(path=str(folder), width=width, height=height, max_sequence_length=family.tokens)


@pytest.mark.parametrize("size", [SQUARE, WIDE, HIGH], ids=["square", "wide", "high"])
@pytest.mark.parametrize("guided", [False, True])
def test_latents_are_the_pipelines(family: tuple[Family, Path], guided: bool, size: Size) -> None:
    chosen, _ = family
    model = load_model(settings(*family, size))
    noise = fixed_noise(model, range(2), 0)
    guidance = chosen.guidance if guided else 1.0
    ours = sample_latents(model, PROMPTS, noise, 4, guidance)
    other: Any = load_model(settings(*family, size))
    theirs = chosen.call(other.pipeline, PROMPTS, noise, 4, guidance)
    assert ours.shape == noise.shape
    assert (ours.shape[3] / ours.shape[2]) == size[0] / size[1]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[0], ours[1])


@pytest.mark.parametrize("guided", [False, True])
def test_rollouts_are_those_of_the_solvers_own_scheduler(family: tuple[Family, Path], guided: bool) -> None:
    """Grid and stepper together, against diffusers' DPMSolverMultistepScheduler stepping the same denoiser."""
    chosen, _ = family
    model: Any = load_model(settings(*family))
    guidance = chosen.guidance if guided else 1.0
    noise, asked, empty = fixed_noise(model, range(2), 0), model.encode(PROMPTS), model.encode([""])
    sigmas = model.sigmas(10, None, "dpm")

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return guided_velocity(model, x, sigma, asked, empty, guidance)

    with torch.no_grad():
        ours = sample_ode(velocity, noise * model.initial_scale(sigmas[0]), sigmas, "dpm-solver++")
        theirs = by_diffusers(model, velocity, noise, 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rollouts_are_near_the_flow(family: tuple[Family, Path], guidance: float) -> None:
    """Grid and stepper together on pictures that are Gaussian, whose velocity is known, against 4,000 small steps.

    Guidance goes away from a wider Gaussian, the empty prompt's.
    """
    model = load_model(settings(*family))
    sigmas = model.sigmas(10, None, "dpm")
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * model.initial_scale(sigmas[0])

    def gaussian(x: Tensor, sigma: float, mean: float, spread: float) -> Tensor:
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return (sigma - (1 - sigma) * spread**2) / variance * (x - (1 - sigma) * mean) - mean

    def velocity(x: Tensor, sigma: float) -> Tensor:
        empty = gaussian(x, sigma, 0.0, 1.0)
        return empty + guidance * (gaussian(x, sigma, 0.5, 0.6) - empty)

    exact = sample_ode(velocity, start, [sigmas[0] * (1 - step / 4000) for step in range(4000)] + [0.0], "euler")
    error = (sample_ode(velocity, start, sigmas, "dpm-solver++") - exact).abs().max()
    assert error < (sample_ode(velocity, start, sigmas, "euler") - exact).abs().max()
    # The native grid starts elsewhere, so it has an exact end of its own.
    native = model.sigmas(10)
    start = start * model.initial_scale(native[0]) / model.initial_scale(sigmas[0])
    exact = sample_ode(velocity, start, [native[0] * (1 - step / 4000) for step in range(4000)] + [0.0], "euler")
    # Where the pipeline's grid is even before it is shifted, the two are one but for the first point.
    assert error < 1.01 * (sample_ode(velocity, start, native, "dpm-solver++") - exact).abs().max()


def by_diffusers(model: Any, velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """The latents of the solver's own scheduler; U-Nets are told a timestep and say epsilon, flows their velocity."""
    config = model.pipeline.scheduler.config
    if isinstance(model, NoisePredictingModel):
        scheduler = DPMSolverMultistepScheduler.from_config(config, prediction_type="epsilon")
    else:
        shift = config.get("flow_shift") or model.shift(steps)
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        )
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        if isinstance(model, NoisePredictingModel):
            alpha = scheduler.alphas_cumprod[t].item()
            a, s = alpha**0.5, (1 - alpha) ** 0.5
            flow = x / (a + s)
            predicted = flow + (1 - s / (a + s)) * velocity(flow, s / (a + s))  # the noise
        else:
            predicted = velocity(x, float(scheduler.sigmas[index]))
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_picture_may_have_a_noise_level_of_its_own(family: tuple[Family, Path], guidance: float) -> None:
    """As in passes of their own; every picture's text has its own length."""
    model = load_model(settings(*family))
    levels = (model.sigmas(4)[0], 0.5, 0.5, 0.05)
    latents, asked, empty = torch.randn(4, *model.latent_shape), model.encode([*PROMPTS, *PROMPTS]), model.encode([""])
    together = guided_velocity(model, latents, model.levels(levels), asked, empty, guidance)
    alone = [
        guided_velocity(model, latents[row : row + 1], level, asked[[row]], empty, guidance)
        for row, level in enumerate(levels)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, guided_velocity(model, latents, 0.5, asked, empty, guidance), rtol=0.01)


@pytest.mark.parametrize("size", [SQUARE, WIDE, HIGH], ids=["square", "wide", "high"])
def test_pictures_have_the_size_asked_for(family: tuple[Family, Path], size: Size) -> None:
    model = load_model(settings(*family, size))
    pictures = model.decode(fixed_noise(model, range(1), 0))
    assert (model.width, model.height) == size
    assert pictures.shape == (1, 3, size[1], size[0])
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_training_lowers_the_matching_error(family: tuple[Family, Path]) -> None:
    policy = Policy(load_model(settings(*family)), LoraConfig(rank=4, alpha=8), seed=0)
    model = policy.model
    asked, clean, sigma = model.encode(PROMPTS), fixed_noise(model, range(2), 0), 0.7
    noise = fixed_noise(model, range(2, 4), 0)
    noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-2)
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
    config = shapes_run(model=settings(*family), lora=LoraConfig(rank=4, alpha=8))
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(config, 1))
    noise = fixed_noise(policy.model, range(2), 0)
    with torch.no_grad():
        ours = sample_latents(policy.model, PROMPTS, noise, 4, 1.0)
    other: Any = load_model(settings(*family))
    pipe = other.pipeline
    plain = chosen.call(pipe, PROMPTS, noise, 4, 1.0)
    pipe.load_lora_weights(str(path))
    theirs = chosen.call(pipe, PROMPTS, noise, 4, 1.0)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)
    assert (theirs - plain).abs().max() > 0.01
    merged = load_model(settings(*family))
    apply_adapter(merged, path)
    ours_merged = sample_latents(merged, PROMPTS, noise, 4, 1.0)
    torch.testing.assert_close(ours_merged, ours, rtol=1e-3, atol=1e-3)
    tensors = read_adapter(path).tensors
    loaded = [name for name, _ in getattr(pipe, policy.model.prefix).named_parameters() if ".lora_" in name]
    assert len(loaded) == len(tensors)


def test_the_plan_knows_its_parameters(family: tuple[Family, Path]) -> None:
    training = {"prompts_per_iteration": 1, "group_size": 2}
    config = shapes_run(model=settings(*family).model_dump(), training=training)
    plan = make_plan(config)
    denoiser = load_model(settings(*family)).denoiser
    assert plan.parameters == sum(p.numel() for p in denoiser.parameters())
    assert plan.phases["training"] > 0


def test_a_base_is_known_again_from_what_checkpoints_say_of_it(family: tuple[Family, Path]) -> None:
    now = load_model(settings(*family)).identity
    then = {name: PartIdentity.model_validate_json(part.model_dump_json()) for name, part in now.items()}
    assert {name: part.detail for name, part in compared_parts(then, now).items() if part.verdict != "the same"} == {}


def test_dgpo_runs(family: tuple[Family, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = parse_config(
        {
            "model": settings(*family, HIGH).model_dump(),
            "lora": {"rank": 4, "alpha": 8},
            "prompts": {"train": str(tmp_path / "prompts.txt")},
            "rewards": "brightness",
            "rollout": {"steps": 4},
            "algorithm": {"name": "dgpo", "timesteps": 2, "noisiest_steps": 3, "rollout_guidance": 2},
            "training": {"prompts_per_iteration": 2, "group_size": 4, "iterations": 2, "micro_batch_size": 3},
        },
        "test",
    )

    def brightness(images: Tensor, prompts: object) -> Tensor:
        assert images.shape[2:] == (64, 32)
        return images.mean((1, 2, 3))

    trainer = build_trainer(config, rewards=one_reward(brightness))
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


def test_a_models_own_file_names_no_code_to_run(tmp_path: Path) -> None:
    code = tmp_path / "family.py"
    code.write_text("raise SystemExit('was run')")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"{code}:Family"}))
    with pytest.raises(UserError, match="is not supported; supported: "):
        load_model(ModelConfig(path=str(tmp_path)))


def test_unet_adapters_have_the_names_that_comfyui_reads(tmp_path: Path) -> None:
    """ComfyUI knows a U-Net's layers as lora_unet_<path with underscores>, or under no name that diffusers reads."""
    FAMILIES["sdxl"].build(tmp_path)
    policy = Policy(load_model(settings(FAMILIES["sdxl"], tmp_path)), LoraConfig(rank=4, alpha=8), seed=0)
    keys = [policy.model.adapter_key(name) for name in policy.parameters]
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in keys
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("lora_unet_") and key.count(".") == 2 for key in keys)
