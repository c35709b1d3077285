"""Zero terminal SNR: v-models sample as diffusers does, schedule and stepper, and train; epsilon says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms.forward import matching_error
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import guided_velocity
from dgpo_plugin.models.generate import fixed_noise, sample_latents
from dgpo_plugin.samplers.ode import sample_ode
from dgpo_plugin.samplers.sde import flow_sde_step
from dgpo_plugin.training.build import build_trainer
from tests.conftest import one_reward
from tests.dgpo_plugin.families import FAMILIES, call_unet, ddim

pytestmark = pytest.mark.fast

PROMPTS = ["a red circle", "two blue squares and a triangle"]
ZERO = {"rescale_betas_zero_snr": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim trailing": ("DDIMScheduler", {**ZERO, "timestep_spacing": "trailing"}),
    "ddim linspace": ("DDIMScheduler", {**ZERO, "timestep_spacing": "linspace"}),
    "ddim leading": ("DDIMScheduler", ZERO),
    "euler trailing": ("EulerDiscreteScheduler", {**ZERO, "timestep_spacing": "trailing"}),
    "euler linspace": ("EulerDiscreteScheduler", {**ZERO, "timestep_spacing": "linspace"}),
    "euler leading": ("EulerDiscreteScheduler", {**ZERO, "timestep_spacing": "leading"}),
}


@pytest.fixture(scope="module", params=["sd21-v", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    FAMILIES[request.param].build(path)
    return path


def described(folder: Path, scheduler: str, settings: dict[str, Any], prediction: str = "v_prediction") -> ModelConfig:
    """The pipeline with another scheduler's configuration."""
    config = dict(ddim(prediction).config)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    text = json.dumps({**config, **settings, "_class_name": scheduler})
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    return ModelConfig(path=str(folder), width=32, height=32)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_the_pipelines(folder: Path, name: str, guidance: float) -> None:
    config = described(folder, *SCHEDULERS[name])
    model: Any = load_model(config)
    ours = sample_latents(model, PROMPTS, fixed_noise(model, range(2), 0), 4, guidance)
    if name == "ddim linspace":  # DDIM's own steps do not lead from one of these timesteps to the next
        assert model.sigmas(4)[0] == 1
        assert ours.isfinite().all()
        return
    theirs = call_unet(load_model(config).pipeline, PROMPTS, fixed_noise(model, range(2), 0), 4, guidance)  # type: ignore[attr-defined]
    # Euler's pictures lie at 4,096 noise amplitudes, where float32 has steps of 2.4e-4.
    tolerance = 1e-3 if name.startswith("euler") else 1e-4
    torch.testing.assert_close(ours, theirs.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rollouts_are_the_solvers_own(folder: Path, name: str) -> None:
    """DPM-Solver++ on its own grid, against diffusers' DPMSolverMultistepScheduler with the model's own prediction."""
    model: Any = load_model(described(folder, *SCHEDULERS[name]))
    noise, asked, empty = fixed_noise(model, range(2), 0), model.encode(PROMPTS), model.encode([""])

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return guided_velocity(model, x, sigma, asked, empty, 1.0)

    sigmas = model.sigmas(10, None, "dpm")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        ours = sample_ode(velocity, noise * model.initial_scale(sigmas[0]), sigmas, "dpm-solver++")
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            predicted = model.predict(x, float(t), asked.tensors)
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_the_terminal_step_is_pure_noise(folder: Path) -> None:
    """a = 0, s = 1: the denoiser is asked at timestep 999 for what it sees, and its v is -x0."""
    model: Any = load_model(described(folder, *SCHEDULERS["ddim trailing"]))
    assert model.sigmas(4)[0] == 1
    assert model.initial_scale(1.0) == model.error_weight(1.0) == 1
    asked, noise = model.encode(PROMPTS), fixed_noise(model, range(2), 0)
    clean = fixed_noise(model, range(2, 4), 0)
    with torch.no_grad():
        own = model.predict(noise, 999.0, asked.tensors)
        velocity = model.velocity(noise, 1.0, asked)
        almost = model.velocity(noise, 1 - 1e-7, asked)
    torch.testing.assert_close(velocity, noise + own, rtol=0, atol=1e-6)
    torch.testing.assert_close(almost, velocity, rtol=1e-3, atol=1e-3)
    expected = matching_error(own, -clean)
    torch.testing.assert_close(matching_error(velocity, noise - clean), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim trailing", "euler trailing"])
@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "dgpo", "timesteps": 3, "noisiest_steps": 3, "rollout_guidance": 2},
        {"name": "dgpo", "timesteps": 3, "noisiest_steps": 3, "sampler": "euler", "rollout_guidance": 1},
        {"name": "dgpo", "timesteps": 2, "t_min": 0.5, "rollout_guidance": 1},
        {"name": "flow-grpo", "guidance": 1},
        {"name": "flow-grpo-fast", "window": 2, "window_range": 2},
    ],
)
def test_it_trains(folder: Path, name: str, algorithm: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = parse_config(
        {
            "model": described(folder, *SCHEDULERS[name]).model_dump(),
            "lora": {"rank": 4, "alpha": 8},
            "prompts": {"train": str(tmp_path / "prompts.txt")},
            "rewards": "brightness",
            "rollout": {"steps": 4},
            "algorithm": algorithm,
            "training": {"prompts_per_iteration": 1, "group_size": 4, "iterations": 1},
        },
        "test",
    )
    trainer = build_trainer(config, rewards=one_reward(lambda images, prompts: images.mean((1, 2, 3))))
    rollouts: list[Tensor] = []
    decode = trainer.model.decode
    vars(trainer.model)["decode"] = lambda latents: rollouts.append(latents) or decode(latents)  # type: ignore[func-returns-value]
    record = next(trainer.iterations())
    assert 0 < record["grad_norm"] < float("inf")
    assert max(latents.abs().max() for latents in rollouts) < 50, "the pictures left the flow"


@pytest.mark.parametrize("sigma", [1.0, 0.99976, 0.99967])
def test_the_first_stochastic_step_stays_in_the_flow(sigma: float) -> None:
    """Of a Gaussian flow the step keeps the spread, also where a schedule starts almost at 1."""
    noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    step = flow_sde_step(noise, noise, sigma, 0.9, 0.7, 0.9)
    spread = (step.mean.square().mean() + step.std**2).sqrt()
    assert 0.8 < spread < 1.1


def epsilon(folder: Path, scheduler: str, settings: dict[str, Any]) -> Callable[[], object]:
    return lambda: load_model(described(folder, scheduler, settings, "epsilon"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_epsilon_says_why_it_cannot(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="rescale_betas_zero_snr with prediction_type epsilon.*all is noise") as caught:
        epsilon(folder, *SCHEDULERS[name])()
    assert "\n" not in str(caught.value)
    betas = [*torch.linspace(0.0001, 0.02, 999).tolist(), 1.0]
    with pytest.raises(UserError, match="prediction_type epsilon"):
        epsilon(folder, "DDIMScheduler", {"trained_betas": betas})()


def test_other_descriptions_that_cannot_be_trained_are_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="predicts sample; supported: epsilon, v_prediction"):
        load_model(described(folder, "DDIMScheduler", {}, "sample"))
    with pytest.raises(UserError, match="EDMEulerScheduler, has no table of noise levels"):
        load_model(described(folder, "EDMEulerScheduler", {}))


def test_a_class_that_does_not_know_the_description_honors_it_all_the_same(folder: Path) -> None:
    model = load_model(described(folder, "PNDMScheduler", {**ZERO, "timestep_spacing": "trailing"}))
    assert model.sigmas(4)[0] == 1
