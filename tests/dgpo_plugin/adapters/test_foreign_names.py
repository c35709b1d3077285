"""Adapters of other trainers, named in their ways: every layer's update is that of diffusers' own loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters import read_adapter
from dgpo_plugin.adapters.layers import updates_for
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.load import load_model
from tests.dgpo_plugin.families import FAMILIES

Tensors = dict[str, Tensor]
KOHYA, PEFT, DOTTED = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded and family == "sd3":
            loaded[family] = load_model(ModelConfig(path="shapes", max_sequence_length=1))
        elif family not in loaded:
            folder = tmp_path_factory.mktemp(family)
            FAMILIES[family].build(folder)
            tokens = FAMILIES[family].tokens
            loaded[family] = load_model(ModelConfig(path=str(folder), max_sequence_length=tokens))
        return loaded[family]

    return get


def lora(key: str, shape: tuple[int, ...], ends: tuple[str, str] = KOHYA, alpha: float | None = None) -> Tensors:
    """A LoRA of rank 4 for a weight of that shape."""
    draws = torch.Generator().manual_seed(len(key))
    rank = 4
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draws)
    made = {key + ends[0]: torch.randn(rank, *shape[1:], generator=draws), key + ends[1]: up}
    return made if alpha is None else {**made, f"{key}.alpha": torch.tensor(alpha)}


def shape(model: Any, *modules: str) -> tuple[int, ...]:
    """Of several layers' weights, one above the other."""
    weights = [model.denoiser.get_submodule(module).weight for module in modules]
    return (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])


def ours(model: Any, path: Path) -> Tensors:
    names = {module: name for name, module in model.denoiser.named_modules()}
    updates = updates_for(model, read_adapter(path).usable.tensors)
    return {names[update.layer]: (update.up.flatten(1) @ update.down.flatten(1)) for update in updates}


def theirs(model: Any, path: Path) -> Tensors:
    """What diffusers' loader puts on each layer."""
    model.pipeline.load_lora_weights(str(path))
    try:
        (name,) = model.pipeline.get_active_adapters()
        layers = [
            (key, module) for key, module in model.denoiser.named_modules() if hasattr(module, "get_delta_weight")
        ]
        return {key: layer.get_delta_weight(name).detach().flatten(1) for key, layer in layers if name in layer.lora_A}
    finally:
        model.pipeline.unload_lora_weights()


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
FLAT = BLOCK.replace(".", "_")
QKV = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
FLUX_OUT = "transformer_blocks.0.attn.to_out.0"


def kohya_sd15(model: Any) -> Tensors:
    """With the 1x1 convolutions that kohya's default targets have."""
    modules = [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn2.to_out.0",
        f"{BLOCK}.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
    ]
    made: Tensors = {}
    for module in modules:
        made |= lora(f"lora_unet_{module.replace('.', '_')}", shape(model, module), alpha=2.0)
    return made | lora("lora_te_text_model_encoder_layers_0_mlp_fc1", (64, 32), alpha=1.0)


def locon_sd15(model: Any) -> Tensors:
    modules = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", f"{BLOCK}.attn1.to_k"]
    made: Tensors = {}
    for module in modules:
        made |= lora(f"lora_unet_{module.replace('.', '_')}", shape(model, module), alpha=1.0)
    return made


def old_diffusers(model: Any) -> Tensors:
    """As diffusers' example scripts wrote in early 2023."""
    module = f"{BLOCK}.attn1"
    return lora(
        f"unet.{module}.processor.to_q_lora", shape(model, f"{module}.to_q"), (".down.weight", ".up.weight")
    ) | lora(f"unet.{module}.processor.to_out_lora", shape(model, f"{module}.to_out.0"), (".down.weight", ".up.weight"))


def peft_in_unet(model: Any) -> Tensors:
    return lora(f"unet.{BLOCK}.attn1.to_q", shape(model, f"{BLOCK}.attn1.to_q"), PEFT)


def dotted_in_unet(model: Any) -> Tensors:
    return lora(f"unet.{BLOCK}.ff.net.2", shape(model, f"{BLOCK}.ff.net.2"), DOTTED)


def sgm_sdxl(model: Any) -> Tensors:
    """kohya's SDXL, in Stability AI's blocks; with one layer a block, input_blocks 3 is the second block's first."""
    native = {
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": f"{BLOCK}.attn1.to_q",
        "input_blocks_3_1_transformer_blocks_0_attn2_to_out_0": f"{BLOCK}.attn2.to_out.0",
        "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "middle_block_1_transformer_blocks_0_ff_net_2": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_k": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    }
    made: Tensors = {}
    for name, module in native.items():
        made |= lora(f"lora_unet_{name}", shape(model, module), alpha=2.0)
    return made | lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", (64, 32), alpha=1.0)


def kohya_flux(model: Any) -> Tensors:
    return {
        **lora("lora_unet_double_blocks_0_img_attn_qkv", shape(model, *QKV), alpha=2.0),
        **lora(
            "lora_unet_double_blocks_1_txt_mlp_0", shape(model, "transformer_blocks.1.ff_context.net.0.proj"), alpha=8.0
        ),
        **lora("lora_unet_double_blocks_0_img_mod_lin", shape(model, "transformer_blocks.0.norm1.linear"), alpha=1.0),
        **lora("lora_unet_single_blocks_0_linear2", shape(model, "single_transformer_blocks.0.proj_out"), alpha=4.0),
    }


def comfy_flux(model: Any) -> Tensors:
    return lora("diffusion_model.double_blocks.0.img_attn.qkv", shape(model, *QKV), alpha=2.0)


def xlabs_flux(model: Any) -> Tensors:
    ends = (".down.weight", ".up.weight")
    return {
        **lora("double_blocks.0.processor.qkv_lora1", shape(model, *QKV), ends),
        **lora("double_blocks.0.processor.proj_lora1", shape(model, FLUX_OUT), ends),
        **lora("single_blocks.1.processor.proj_lora", shape(model, "single_transformer_blocks.1.proj_out"), ends),
    }


def diffusers_flux_with_alpha(model: Any) -> Tensors:
    return lora(f"transformer.{FLUX_OUT}", shape(model, FLUX_OUT), PEFT, alpha=2.0)


def onetrainer_flux(model: Any) -> Tensors:
    return lora(f"lora_transformer_{FLUX_OUT.replace('.', '_')}", shape(model, FLUX_OUT), alpha=2.0)


def comfy_flux2(model: Any) -> Tensors:
    return lora("diffusion_model.double_blocks.0.img_attn.qkv", shape(model, *QKV), PEFT)


def peft_flux2(model: Any) -> Tensors:
    return lora("base_model.model.double_blocks.0.img_attn.proj", shape(model, FLUX_OUT), PEFT)


def kohya_qwen(model: Any) -> Tensors:
    return lora("lora_unet_transformer_blocks_0_attn_to_q", shape(model, QKV[0]), alpha=2.0)


def comfy_qwen(model: Any) -> Tensors:
    return lora(f"diffusion_model.{QKV[1]}", shape(model, QKV[1]), PEFT, alpha=2.0)


def bare_qwen(model: Any) -> Tensors:
    return lora(QKV[2], shape(model, QKV[2]), alpha=2.0)


def default_qwen(model: Any) -> Tensors:
    return lora(QKV[0], shape(model, QKV[0]), (".lora_A.default.weight", ".lora_B.default.weight"))


def comfy_z_image(model: Any) -> Tensors:
    return lora("diffusion_model.layers.0.attention.to_q", shape(model, "layers.0.attention.to_q"), PEFT, alpha=2.0)


def kohya_z_image(model: Any) -> Tensors:
    return lora("lora_unet_layers_0_feed_forward_w1", shape(model, "layers.0.feed_forward.w1"), alpha=2.0)


def dotted_sd3(model: Any) -> Tensors:
    return lora(f"transformer.{FLUX_OUT}", shape(model, FLUX_OUT), DOTTED)


CASES = [
    ("sd15", kohya_sd15),
    ("sd15", locon_sd15),
    ("sd15", old_diffusers),
    ("sd15", peft_in_unet),
    ("sd15", dotted_in_unet),
    ("sdxl", sgm_sdxl),
    ("sdxl", old_diffusers),
    ("flux", kohya_flux),
    ("flux", comfy_flux),
    ("flux", xlabs_flux),
    ("flux", diffusers_flux_with_alpha),
    ("flux", onetrainer_flux),
    ("flux2-klein", comfy_flux2),
    ("flux2-klein", peft_flux2),
    ("qwen-image", kohya_qwen),
    ("qwen-image", comfy_qwen),
    ("qwen-image", bare_qwen),
    ("qwen-image", default_qwen),
    ("z-image", comfy_z_image),
    ("z-image", kohya_z_image),
    ("sd3", dotted_sd3),
]


@pytest.mark.parametrize(("family", "make"), CASES)
def test_every_layer_gets_what_diffusers_gives_it(
    models: Callable[[str], Any], tmp_path: Path, family: str, make: Callable[[Any], Tensors]
) -> None:
    model, path = models(family), tmp_path / "foreign.safetensors"
    tensors = make(model)
    save_file(tensors, path)
    got, expected = ours(model, path), theirs(model, path)
    assert got.keys() == expected.keys()
    assert got
    for name, update in got.items():
        torch.testing.assert_close(update, expected[name].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["default", "default_0", "policy"])
def test_an_adapters_name_in_peft_stands_in_its_keys(models: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    model, path = models("sd3"), tmp_path / "named.safetensors"
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
    tensors = lora(f"base_model.model.{QKV[0]}", shape(model, QKV[0]), ends)
    save_file(tensors, path)
    down, up = tensors.values()
    torch.testing.assert_close(ours(model, path), {QKV[0]: up @ down})
    more = lora(f"base_model.model.{QKV[0]}", shape(model, QKV[0]), (".lora_A.other.weight", ".lora_B.other.weight"))
    save_file({**tensors, **more}, path)
    with pytest.raises(UserError, match="or its layer has another LoRA"):
        ours(model, path)


def native_sd3(model: Any) -> dict[str, list[str]]:
    """Stability AI's layers, and diffusers' that they are."""
    last = len(model.denoiser.transformer_blocks) - 1
    return {
        "joint_blocks.0.x_block.attn.qkv": QKV,
        "joint_blocks.0.context_block.attn.qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
        "joint_blocks.1.x_block.attn.proj": ["transformer_blocks.1.attn.to_out.0"],
        "joint_blocks.1.context_block.mlp.fc1": ["transformer_blocks.1.ff_context.net.0.proj"],
        "joint_blocks.2.x_block.mlp.fc2": ["transformer_blocks.2.ff.net.2"],
        "joint_blocks.2.context_block.adaLN_modulation.1": ["transformer_blocks.2.norm1_context.linear"],
        f"joint_blocks.{last}.context_block.adaLN_modulation.1": [f"transformer_blocks.{last}.norm1_context.linear"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "context_embedder": ["context_embedder"],
        "x_embedder.proj": ["pos_embed.proj"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    }


@pytest.mark.parametrize("way", ["lora_unet_", "diffusion_model."])
def test_kohyas_stable_diffusion_3_which_diffusers_does_not_read(
    models: Callable[[str], Any], tmp_path: Path, way: str
) -> None:
    """Fused projections are cut in three; the last modulations are turned, as diffusers' checkpoint converter does."""
    model, path = models("sd3"), tmp_path / "kohya.safetensors"
    tensors: Tensors = {}
    native = native_sd3(model)
    for name, modules in native.items():
        key = way + (name.replace(".", "_") if way == "lora_unet_" else name)
        tensors |= lora(key, shape(model, *modules), KOHYA if way == "lora_unet_" else PEFT, alpha=2.0)
    save_file(tensors, path)
    got = ours(model, path)
    assert sorted(got) == sorted(module for modules in native.values() for module in modules)
    last = len(model.denoiser.transformer_blocks) - 1
    for name, modules in native.items():
        key = way + (name.replace(".", "_") if way == "lora_unet_" else name)
        down, up = (tensors[key + end] for end in (KOHYA if way == "lora_unet_" else PEFT))
        update = 0.5 * up.flatten(1) @ down.flatten(1)
        if modules[0] in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"):
            update = torch.cat(update.chunk(2)[::-1])
        torch.testing.assert_close(torch.cat([got[module] for module in modules]), update)


OUT = f"transformer.{FLUX_OUT}"


def with_it(**parts: tuple[int, ...]) -> Callable[[Any], Tensors]:
    """A sound LoRA, and other tensors of the same layer."""

    def make(model: Any) -> Tensors:
        more = {f"{OUT}.{name.replace('__', '.')}": torch.ones(size) for name, size in parts.items()}
        return {**lora(f"transformer.{QKV[0]}", shape(model, QKV[0]), PEFT), **more}

    return make


@pytest.mark.parametrize(
    ("family", "make", "told"),
    [
        ("sd3", with_it(lokr_w1=(8, 8), lokr_w2=(16, 16)), "2 of its 4 tensors are no LoRA: 2 LoKr (first: "),
        ("sd3", with_it(hada_w1_a=(8, 8), hada_w1_b=(16, 16)), "2 LoHa (first: "),
        ("sd3", with_it(oft_blocks=(8, 8, 8)), "1 OFT (first: "),
        ("sd3", with_it(oft_R__weight=(8, 8)), "1 OFT (first: "),
        ("sd3", with_it(dora_scale=(8, 1)), "1 DoRA (first: "),
        ("sd3", with_it(lora_magnitude_vector=(8,)), "1 DoRA (first: "),
        ("sd3", with_it(a1__weight=(8, 8), b2__weight=(8, 8)), "2 GLoRA (first: "),
        ("sd3", with_it(vera_lambda_b=(8,)), "1 VeRA (first: "),
        ("sd3", with_it(diff_b=(8,)), "1 bias difference (first: "),
        ("sd3", with_it(lora_B__bias=(8,)), "1 bias difference (first: "),
        ("sd3", with_it(diff=(8, 8)), "1 weight difference (first: "),
        ("sd3", with_it(strange=(8,)), "1 of no known kind (first: "),
        ("sd3", with_it(lora_A__weight=(4, 8)), "has no other half"),
        (
            "sd3",
            lambda model: lora("lora_te1_text_model_mlp_fc1", (8, 8)),
            "all of its 2 tensors are for a text encoder",
        ),
        ("sd3", lambda model: lora("lora_unet_input_blocks_1_1_proj_in", (8, 8)), "2 of 2 tensors match no weight"),
        ("sd3", lambda model: lora(OUT, (8, 8), PEFT), "2 of 2 tensors match no weight"),
        (
            "flux",
            lambda model: lora("lora_unet_joint_blocks_0_x_block_attn_qkv", (8, 8)),
            "match no weight|cannot read",
        ),
        ("sdxl", lambda model: lora("lora_unet_nowhere", (8, 8)), "match no weight"),
        (
            "flux",
            lambda model: {**diffusers_flux_with_alpha(model), **lora("unheard.of", (8, 8))},
            r"2 of 4 tensors match no weight .*\(first: unheard.of",
        ),
        (
            "flux",
            lambda model: {
                "img_in.lora_A.weight": torch.ones(4, 8),
                "single_blocks.0.norm.key_norm.scale": torch.ones(8),
            },
            "is a FLUX control LoRA",
        ),
        (
            "sd3",
            lambda model: {
                **lora(OUT, shape(model, FLUX_OUT), PEFT),
                **lora(f"lora_unet_{FLUX_OUT.replace('.', '_')}", shape(model, FLUX_OUT)),
            },
            "has two LoRAs for",
        ),
    ],
)
def test_what_cannot_be_applied_is_one_line_that_names_it(
    models: Callable[[str], Any], tmp_path: Path, family: str, make: Callable[[Any], Tensors], told: str
) -> None:
    model, path = models(family), tmp_path / "odd.safetensors"
    save_file(make(model), path)
    with pytest.raises(UserError, match=re.escape(told) if "(first: " in told and ".*" not in told else told) as caught:
        ours(model, path)
    assert "\n" not in str(caught.value)
