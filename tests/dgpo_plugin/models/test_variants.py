"""Variants keep their names: ModelSpec's and kohya's, told from the parts' configurations of the published models."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from dgpo_plugin.adapters import AdapterCard, TrainingFacts, export_adapter, read_adapter
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.families.flux import FluxModel
from dgpo_plugin.models.families.flux2 import Flux2DevModel, Flux2KleinModel
from dgpo_plugin.models.families.qwen_image import QwenImageModel
from dgpo_plugin.models.families.sana import SanaModel
from dgpo_plugin.models.families.sd3 import SD3Model
from dgpo_plugin.models.families.sd15 import SD15Model
from dgpo_plugin.models.families.sdxl import SDXLModel
from dgpo_plugin.models.families.z_image import ZImageModel
from dgpo_plugin.models.policy import Policy
from tests.conftest import shapes_run
from tests.dgpo_plugin.families import FAMILIES, ddim, sd15

pytestmark = pytest.mark.fast

MEDIUM_35 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
LARGE_35 = {"num_layers": 38, "num_attention_heads": 38, "qk_norm": "rms_norm", "pos_embed_max_size": 192}
MEDIUM_3 = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
TINY_35 = {"num_layers": 2, "num_attention_heads": 2, "qk_norm": "rms_norm"}
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}


def variant(family: Any, dims: dict[str, Any], path: str, prediction: str = "epsilon") -> tuple[str, str]:
    """What a model of these dimensions is called, without its weights."""
    model = object.__new__(family)
    denoiser_class = family.component_classes[family.prefix]
    defaults = {name: p.default for name, p in inspect.signature(denoiser_class.__init__).parameters.items()}
    model.denoiser = SimpleNamespace(config=SimpleNamespace(**{**defaults, **dims}))
    model.config, model.prediction = ModelConfig(path=path), prediction
    found: tuple[str, str] = model.variant()
    return found


@pytest.mark.parametrize(
    ("family", "dims", "path", "names"),
    [
        (
            SD3Model,
            MEDIUM_3,
            "stabilityai/stable-diffusion-3-medium-diffusers",
            ("stable-diffusion-3-medium", "3-medium"),
        ),
        (
            SD3Model,
            MEDIUM_35,
            "stabilityai/stable-diffusion-3.5-medium",
            ("stable-diffusion-v3.5-medium", "3-5-medium"),
        ),
        (SD3Model, MEDIUM_35, "/models/my base", ("stable-diffusion-v3.5-medium", "3-5-medium")),
        (SD3Model, MEDIUM_35, "/large things/turbo", ("stable-diffusion-v3.5-medium", "3-5-medium")),
        (SD3Model, LARGE_35, "stabilityai/stable-diffusion-3.5-large", ("stable-diffusion-v3.5-large", "3-5-large")),
        (SD3Model, LARGE_35, "C:\\turbo\\base", ("stable-diffusion-v3.5-large", "3-5-large")),
        (
            SD3Model,
            LARGE_35,
            "stabilityai/stable-diffusion-3.5-large-turbo",
            ("stable-diffusion-v3.5-large-turbo", "3-5-large"),
        ),
        (
            SD3Model,
            LARGE_35,
            "/hub/models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0123abc",
            ("stable-diffusion-v3.5-large-turbo", "3-5-large"),
        ),
        (SD3Model, TINY_35, "me/sd3.5-large-tiny", ("stable-diffusion-v3.5-large", "3-5-large")),
        (SD3Model, TINY_35, "tiny-sd35-medium", ("stable-diffusion-v3.5-medium", "3-5-medium")),
        (SD3Model, TINY_35, "shapes", ("stable-diffusion-3-medium", "3-medium")),
        (FluxModel, {"guidance_embeds": True}, "black-forest-labs/FLUX.1-dev", ("flux-1-dev", "flux1")),
        (FluxModel, {"guidance_embeds": True}, "black-forest-labs/FLUX.1-Krea-dev", ("flux-1-dev", "flux1")),
        (FluxModel, {"guidance_embeds": False}, "black-forest-labs/FLUX.1-schnell", ("flux-1-schnell", "flux1")),
        (FluxModel, {"guidance_embeds": False}, "/anywhere/else", ("flux-1-schnell", "flux1")),
        (Flux2DevModel, {}, "black-forest-labs/FLUX.2-dev", ("flux-2-dev", "flux_2_dev")),
        (Flux2KleinModel, {"num_attention_heads": 24}, "base", ("flux-2-klein-4b", "flux_2_klein_4b")),
        (Flux2KleinModel, {"num_attention_heads": 32}, "base", ("flux-2-klein-9b", "flux_2_klein_9b")),
        (QwenImageModel, {}, "Qwen/Qwen-Image", ("qwen-image", "qwen_image")),
        (ZImageModel, {}, "Tongyi-MAI/Z-Image", ("z-image", "z_image")),
        (SanaModel, {"num_layers": 20, "num_attention_heads": 70}, "base", ("sana-1600m", "")),
        (SanaModel, {"num_layers": 28, "num_attention_heads": 36}, "base", ("sana-600m", "")),
        (SanaModel, {"num_layers": 2, "num_attention_heads": 2}, "base", ("sana", "")),
        (SDXLModel, {}, "stabilityai/stable-diffusion-xl-base-1.0", ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")),
    ],
)
def test_a_base_is_called_what_it_is(family: Any, dims: dict[str, Any], path: str, names: tuple[str, str]) -> None:
    assert variant(family, dims, path) == names


@pytest.mark.parametrize(
    ("dims", "prediction", "names"),
    [
        (SD1, "epsilon", ("stable-diffusion-v1", "sd_v1")),
        (SD1, "v_prediction", ("stable-diffusion-v1", "sd_v1_v")),
        (SD2, "epsilon", ("stable-diffusion-v2-512", "sd_v2")),
        (SD2, "v_prediction", ("stable-diffusion-v2-768-v", "sd_v2_v")),
        ({"cross_attention_dim": 32}, "epsilon", ("stable-diffusion-v1", "sd_v1")),
        ({"cross_attention_dim": 32}, "v_prediction", ("stable-diffusion-v2-768-v", "sd_v2_v")),
        ({"cross_attention_dim": 32, "use_linear_projection": True}, "epsilon", ("stable-diffusion-v2-512", "sd_v2")),
    ],
)
def test_stable_diffusion_1_and_2(dims: dict[str, Any], prediction: str, names: tuple[str, str]) -> None:
    assert variant(SD15Model, dims, "base", prediction) == names


def header_of(folder: Path, width: int = 64, height: int = 32) -> dict[str, str]:
    """The header of an adapter of a pipeline's."""
    model = load_model(ModelConfig(path=str(folder), width=width, height=height))
    policy = Policy(model, LoraConfig(rank=2, alpha=4), seed=0, unconditional=model.blank_conditioning(1))
    path = folder / "adapter.safetensors"
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(shapes_run(), 1))
    AdapterCard.of(read_adapter(path))
    return dict(read_adapter(path).header)


def a1111(header: dict[str, str]) -> str:
    """stable-diffusion-webui's rule, extensions-builtin/Lora/network.py, detect_version."""
    if str(header.get("ss_base_model_version", "")).startswith("sdxl_"):
        return "SDXL"
    return "SD2" if str(header.get("ss_v2", "")) == "True" else "SD1"


def test_a1111_and_forge_list_our_adapters_under_the_base_they_are_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, listed in (("sdxl", "SDXL"), ("sd15", "SD1"), ("sd21-v", "SD2")):
        FAMILIES[name].build(tmp_path / name)
        header = header_of(tmp_path / name)
        assert a1111(header) == listed
        assert header["modelspec.prediction_type"] == ("v" if name == "sd21-v" else "epsilon")
        assert header["modelspec.architecture"].endswith("/lora")
        assert header["modelspec.resolution"] == "64x32"


def test_a_header_says_zero_terminal_snr(tmp_path: Path) -> None:
    sd15(tmp_path, "v_prediction")
    ddim("v_prediction", rescale_betas_zero_snr=True).save_pretrained(tmp_path / "scheduler")
    assert header_of(tmp_path)["ss_zero_terminal_snr"] == "True"


def test_flux_without_guidance_is_schnell_in_the_file(tmp_path: Path) -> None:
    FAMILIES["flux"].build(tmp_path)
    assert header_of(tmp_path)["modelspec.architecture"] == "flux-1-dev/lora"
    config = diffusers.FluxTransformer2DModel.load_config(tmp_path / "transformer")
    diffusers.FluxTransformer2DModel.from_config({**config, "guidance_embeds": False}).save_pretrained(
        tmp_path / "transformer"
    )
    header = header_of(tmp_path)
    assert (header["modelspec.architecture"], header["ss_base_model_version"]) == ("flux-1-schnell/lora", "flux1")
