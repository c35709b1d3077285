"""Pictures to clean latents: as diffusers' own pipelines encode them, family by family, and back on real VAEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import Model
from dgpo_plugin.worlds.shapes.render import render as draw_shapes
from dgpo_plugin.worlds.shapes.scenes import train_prompts as shapes_prompts
from dgpo_plugin.worlds.words.captions import train_prompts as words_prompts
from dgpo_plugin.worlds.words.render import render as draw_word
from tests.dgpo_plugin.broken_bases import Bases
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast


def own_function(kind: Any, vae: Any, pictures: Tensor) -> Tensor:
    """What a pipeline makes of pictures (N, 3, H, W) in [-1, 1], where it has a function for that alone."""
    latents: Tensor = kind._encode_vae_image(  # noqa: SLF001 (no public way)
        SimpleNamespace(vae=vae, _patchify_latents=_patchify), pictures, None
    )
    return latents


def _patchify(latents: Tensor) -> Tensor:
    patches: Tensor = diffusers.Flux2Pipeline._patchify_latents(latents)  # noqa: SLF001 (no public way)
    return patches


def with_noise(kind: Any, vae: Any, pictures: Tensor, **sizes: Any) -> Tensor:
    """What an image-to-image pipeline begins with, where it adds noise in the same breath: all but that."""
    kept = SimpleNamespace(add_noise=lambda clean, *_: clean, scale_noise=lambda clean, *_: clean)
    pipeline = SimpleNamespace(vae=vae, scheduler=kept, vae_scale_factor=1)
    options: dict[str, Any] = sizes or {"num_images_per_prompt": 1}
    latents: Tensor = kind.prepare_latents(
        pipeline,
        image=pictures,
        timestep=None,
        batch_size=len(pictures),
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=None,
        **options,
    )
    return latents


def of_sana(vae: Any, pictures: Tensor) -> Tensor:
    """As SanaSprintImg2ImgPipeline.prepare_latents does, whose sigma_data is not Sana's."""
    return vae.encode(pictures).latent * vae.config.scaling_factor


ENCODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "shapes": lambda vae, x: with_noise(diffusers.StableDiffusion3Img2ImgPipeline, vae, x),
    "flux": lambda vae, x: own_function(diffusers.FluxImg2ImgPipeline, vae, x),
    "flux2-klein": lambda vae, x: own_function(diffusers.Flux2KleinPipeline, vae, x),
    "flux2-dev": lambda vae, x: own_function(diffusers.Flux2Pipeline, vae, x),
    "qwen-image": lambda vae, x: own_function(diffusers.QwenImageImg2ImgPipeline, vae, x[:, :, None])[:, :, 0],
    "z-image": lambda vae, x: with_noise(
        diffusers.ZImageImg2ImgPipeline, vae, x, num_channels_latents=16, height=32, width=32
    ),
    "sana": of_sana,
    "sd15": lambda vae, x: with_noise(diffusers.StableDiffusionImg2ImgPipeline, vae, x),
    "sd21-v": lambda vae, x: with_noise(diffusers.StableDiffusionImg2ImgPipeline, vae, x),
    "sdxl": lambda vae, x: with_noise(diffusers.StableDiffusionXLImg2ImgPipeline, vae, x),
}


def family_model(name: str, folder: Path, **settings: Any) -> Any:
    own = {} if name == "shapes" else {"width": 32, "height": 32}
    tokens = 1 if name == "shapes" else FAMILIES[name].tokens
    model: Any = load_model(ModelConfig(path=str(folder), max_sequence_length=tokens, **own, **settings))
    if name.startswith("sd"):  # as published; their pipelines know of no shift
        model.vae.register_to_config(shift_factor=None)
    return model


def pictures_for(model: Model, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, model.height, model.width, generator=generator)


@pytest.mark.parametrize("name", ENCODERS)
def test_clean_latents_are_the_pipelines_own(bases: Bases, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Scale, shift, statistics, patches: all but the draw, for which ours takes the mean."""
    model = family_model(name, bases(name))
    pictures = pictures_for(model)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())
    with torch.no_grad():
        theirs = ENCODERS[name](model.vae, 2 * pictures - 1)
    ours = model.encode_images(pictures)
    assert ours.shape == (3, *model.latent_shape)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "shapes"])
def test_what_was_encoded_is_what_is_decoded(bases: Bases, name: str) -> None:
    """Scaled latents are what :meth:`decode` takes: between the two stands the VAE alone, whatever its statistics."""
    model = family_model(name, bases(name))
    pictures = pictures_for(model)
    with torch.no_grad():
        own = torch.cat([model.encode_pixels(2 * picture - 1) for picture in pictures.split(1)])
        back = model.unscaled(model.encode_images(pictures))
    torch.testing.assert_close(back[:, :, 0] if back.ndim == 5 else back, own, rtol=1e-4, atol=1e-5)


def test_sdxls_latents_with_statistics_of_their_own(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("sdxl", bases("sdxl"))
    model.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[2.0, 1.5, 0.5, 1.0])
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())
    pictures = pictures_for(model)
    with torch.no_grad():
        theirs = ENCODERS["sdxl"](model.vae, 2 * pictures - 1)
    torch.testing.assert_close(model.encode_images(pictures), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("world", "prompts", "draw"), [("shapes", shapes_prompts, draw_shapes), ("words", words_prompts, draw_word)]
)
def test_real_vaes_give_pictures_back(world: str, prompts: Any, draw: Any) -> None:
    rng, chosen = np.random.default_rng(0), prompts()[::40][:8]
    pictures = torch.from_numpy(np.stack([draw(dict(prompt.metadata), rng) for prompt in chosen]))
    model = load_model(ModelConfig(path=world, max_sequence_length=1 if world == "shapes" else 16))
    latents = model.encode_images(pictures)
    error = (model.decode(latents) - pictures).square().mean()
    # A picture of another prompt is hundreds of times as far away.
    assert error < 0.01 * (pictures - pictures.roll(1, 0)).square().mean()
    # The denoiser was trained on latents of about this width.
    assert 0.5 < float(latents.std()) < 2


def test_a_picture_has_the_same_latents_whatever_comes_with_it(bases: Bases) -> None:
    model = family_model("sd15", bases("sd15"))
    pictures = pictures_for(model, 5)
    together = model.encode_images(pictures)
    assert torch.equal(together, torch.cat([model.encode_images(each) for each in pictures.split(2)]))


def test_one_picture_at_a_time_is_in_memory(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("flux", bases("flux"))
    sizes, encode = list[int](), model.encode_pixels

    def counting(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        latents: Tensor = encode(pixels)
        return latents

    monkeypatch.setattr(model, "encode_pixels", counting)
    model.encode_images(pictures_for(model, 4))
    assert sizes == [1, 1, 1, 1]


def test_a_vae_in_half_precision_encodes_in_it(bases: Bases) -> None:
    whole, half = (family_model("sd15", bases("sd15"), vae_precision=kind) for kind in ("fp32", "bf16"))
    pictures = pictures_for(whole)
    coarse = half.encode_images(pictures)
    assert coarse.dtype == torch.float32
    difference = (coarse - whole.encode_images(pictures)).abs().max()
    assert 0 < difference < 0.1


def test_a_vae_that_gives_no_numbers_is_named(bases: Bases) -> None:
    model = family_model("sd15", bases("sd15"))
    model.vae.quant_conv.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"model\.vae_precision fp32: its weights are damaged; fetch the folder vae"):
        model.encode_images(pictures_for(model))
