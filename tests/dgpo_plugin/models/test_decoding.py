"""The VAE: in float32 unless told otherwise, and no seams in pictures that are rewarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, RunConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.generate import fixed_noise
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.plan import make_plan
from tests.conftest import REQUIRED
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast


def built(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    FAMILIES[name].build(folder)
    return folder


def config_of(name: str, folder: Path, **model: Any) -> ModelConfig:
    chosen = FAMILIES[name]
    return ModelConfig(
        **{
            "path": str(folder),
            "width": chosen.width,
            "height": chosen.height,
            "max_sequence_length": chosen.tokens,
            **model,
        }
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vae_is_as_it_was_saved_whatever_the_denoisers_precision(name: str, tmp_path: Path) -> None:
    model: Any = load_model(config_of(name, built(name, tmp_path), precision="bf16"))
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    saved = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    loaded = model.vae.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())  # not rounded on the way
    assert model.decode(fixed_noise(model, range(1), 0)).dtype == torch.float32


def test_another_precision_is_the_users_choice(tmp_path: Path) -> None:
    folder = built("sd15", tmp_path)
    model = load_model(config_of("sd15", folder, vae_precision="bf16"))
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


def test_the_mean_and_the_width_of_latents_that_a_vae_knows_count(tmp_path: Path) -> None:
    """As in diffusers' StableDiffusionXLPipeline; Playground v2.5's VAE has them."""
    folder = built("sdxl", tmp_path)
    mean, std = [-1.5, 0.5, 1.0, 2.0], [4.0, 3.0, 2.0, 5.0]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder / "vae")
    model: Any = load_model(config_of("sdxl", folder))
    chosen = FAMILIES["sdxl"]
    noise = torch.randn(2, 4, *model.latent_shape[1:], generator=torch.Generator().manual_seed(0))
    latents = chosen.call(model.pipeline, ["a", "b"], noise, 2, 1.0)
    scaled = latents * torch.tensor(std).view(1, -1, 1, 1) / vae.config.scaling_factor
    pictures = vae.decode(scaled + torch.tensor(mean).view(1, -1, 1, 1), return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(model.decode(latents), pictures.clamp(0, 1), atol=1e-5, rtol=0)


def test_a_vae_that_overflows_in_fp16_does_not_by_default(tmp_path: Path) -> None:
    """Stable Diffusion XL's does; here a tiny one whose first activations are too large."""
    folder = built("sdxl", tmp_path)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.decoder.conv_in.weight.data.mul_(1e6)
    vae.save_pretrained(folder / "vae")
    half = load_model(config_of("sdxl", folder, precision="fp16"))
    latents = fixed_noise(half, range(2), 0)
    assert half.decode(latents).isfinite().all()
    told = load_model(config_of("sdxl", folder, precision="fp16", vae_precision="fp16"))
    with pytest.raises(UserError, match="model.vae_precision fp16: this VAE overflows in it; set it to fp32 or bf16"):
        told.decode(latents)
    with pytest.raises(UserError, match="before the VAE sees them, so it is the denoiser"):
        told.decode(latents * float("nan"))


def test_the_plan_counts_the_vaes_own_precision(tmp_path: Path) -> None:
    folder = built("sd15", tmp_path)

    def planned(**model: Any) -> Any:
        values = config_of("sd15", folder, offload=True, **model).model_dump()
        training = {"prompts_per_iteration": 1, "group_size": 8}
        return make_plan(parse_config({**REQUIRED, "model": values, "training": training}, "test"))

    whole, half = planned(precision="bf16"), planned(precision="bf16", vae_precision="bf16")
    assert whole.phases["decoding"] > 1.7 * half.phases["decoding"]
    assert whole.phases["sampling"] == half.phases["sampling"]
    assert planned(sliced_decode=True).phases["decoding"] < 0.3 * planned().phases["decoding"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_knows_when_it_would_tile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the VAE itself, at its tile's size and above it."""
    folder = built(name, tmp_path)
    side = load_model(config_of(name, folder, width=1024, height=1024, tiled_decode=True)).tile()
    assert side is not None
    larger = side * 3 // 2
    for width, height, expected in ((side, side, None), (larger, side, side), (side, larger, side)):
        model: Any = load_model(config_of(name, folder, width=width, height=height, tiled_decode=True))
        by_tiles = Mock(wraps=model.vae.tiled_decode)
        monkeypatch.setattr(model.vae, "tiled_decode", by_tiles)
        model.decode(fixed_noise(model, range(1), 0))
        assert model.tile() == expected
        assert by_tiles.called == (expected is not None)
        plain = load_model(config_of(name, folder, width=width, height=height, sliced_decode=True))
        assert plain.tile() is None
        assert plain.vae.use_slicing
        assert not plain.vae.use_tiling


def run_config(folder: Path, prompts: Path, **model: Any) -> RunConfig:
    prompts.write_text("a red circle\n")
    return parse_config(
        {
            "model": config_of("sd15", folder, width=64, height=32, **model).model_dump(),
            "prompts": {"train": str(prompts)},
            "rewards": "brightness",
            "training": {"prompts_per_iteration": 1, "group_size": 2},
        },
        "test",
    )


def test_seams_are_refused_where_rewards_look(tmp_path: Path) -> None:
    folder, prompts = built("sd15", tmp_path / "model"), tmp_path / "prompts.txt"
    tiled = run_config(folder, prompts, tiled_decode=True)
    message = "pictures of 64 x 32 would be put together from tiles of 32, .*sliced_decode.*accept-seams"
    with pytest.raises(UserError, match=message):
        build_trainer(tiled)
    with pytest.raises(UserError, match=message):
        make_plan(tiled)
    build_trainer(run_config(folder, prompts, tiled_decode="accept-seams"))
    build_trainer(run_config(folder, prompts, sliced_decode=True))
    smaller = tiled.model.model_copy(update={"width": 32})
    build_trainer(tiled.model_copy(update={"model": smaller}))  # one tile
