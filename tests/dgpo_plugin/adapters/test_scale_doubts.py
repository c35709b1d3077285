"""A header is believed only where it describes the tensors: otherwise the scale is unknown, and that is said."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, apply_adapter, read_adapter
from dgpo_plugin.adapters.layers import updates_for
from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, OWN_ALPHA, fold_scale
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.load import load_model
from tests.dgpo_plugin.adapters.adapter_files import CONFIG

pytestmark = pytest.mark.fast

CASES = Path(__file__).parents[2] / "cases" / "adapters" / "make.py"
FIRST, SECOND = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"


def lora(prefix: str = "transformer.", *, rank: int = 4, **alphas: float) -> dict[str, Tensor]:
    """A LoRA of two layers of the embedded model; ``first`` and ``second`` have the given alphas."""
    draws, tensors = torch.Generator().manual_seed(0), {}
    for label, name in (("first", FIRST), ("second", SECOND)):
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, 128, generator=draws)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(128, rank, generator=draws)
        if label in alphas:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alphas[label])
    return tensors


def diffusers(prefix: str = "transformer.", **settings: Any) -> dict[str, str]:
    return {DIFFUSERS_HEADER: json.dumps({f"{prefix}{key}": value for key, value in settings.items()})}


DOUBTED: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
    (lora(rank=2), diffusers(r=4, lora_alpha=8), "about rank 4, and transformer.transformer_blocks.0.attn.to_q has 2"),
    (lora(rank=16), diffusers(r=64, lora_alpha=32), "about rank 64"),
    (lora(rank=4), diffusers(lora_alpha=8), "about rank 8"),
    (lora(rank=4), diffusers(r=4, lora_alpha=0), "lora_alpha 0 for transformer.transformer_blocks.0.attn.to_q"),
    (lora(), {"adapter_config": '{"r": 4, "lora_alpha": 8}'}, "its header has adapter_config's alpha 8"),
    (lora(), {"lora_config": "{'rank': 4, 'alpha': 2.0}"}, "its header has lora_config's alpha 2.0"),
    (lora(), {"ss_network_args": '{"network_alpha": "16"}'}, "its header has ss_network_args's alpha 16"),
    (lora(rank=4), diffusers(r=4, lora_alpha=8, rank_pattern={"attn.to_q": 8}), "about rank 8"),
    (lora(rank=2), diffusers(r=4, lora_alpha=8, use_rslora=True), "about rank 4"),
    (lora("base_model.model."), diffusers(r=4, lora_alpha=8), "about transformer.*, and its tensors are base_model.*"),
    (
        lora("diffusion_model."),
        diffusers(r=4, lora_alpha=8),
        "about transformer.*, and its tensors are diffusion_model",
    ),
    (lora(), diffusers("unet.", r=4, lora_alpha=8), "about unet.*, and its tensors are transformer.*"),
    (lora(""), diffusers(r=4, lora_alpha=8), "about transformer.*"),
    (
        lora(),
        diffusers(r=4, lora_alpha=8, alpha_pattern={"transformer_blocks.9.attn.to_q": 2}),
        "no layer of its tensors",
    ),
    (lora(), diffusers(r=4, lora_alpha=8, rank_pattern={"^ff.net.2": 8}), "no layer of its tensors"),
    (lora(), diffusers(r=4, lora_alpha=8, target_modules=["to_k", "to_v"]), "about 2 target_modules"),
    (lora(), {DIFFUSERS_HEADER: "{}"}, "about no layer"),
    (lora(rank=8), {DIFFUSERS_HEADER: "{}"}, "about no layer"),
    (lora(first=2.0, second=0.0), {}, "an .alpha is 0"),
    (lora(first=2.0), {}, "1 of 2 layers have an .alpha (0.5) and 1 have none"),
    (lora(second=8.0), diffusers(r=4, lora_alpha=8), "1 of 2 layers have an .alpha (2)"),
    (lora(first=2.0), {"ss_network_alpha": "2", "ss_network_dim": "4"}, "where the header's ss_network_alpha is 2"),
    (lora(), {"ss_network_alpha": "2.0", "ss_network_dim": "4"}, "ss_network_alpha 2.0, its tensors have no .alpha"),
    (
        lora(),
        {"ss_network_alpha": "8", "ss_network_dim": "8"},
        "ss_network_alpha 8, its tensors have no .alpha and rank 4",
    ),
    (lora(), {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, "ss_network_alpha Dynamic"),
    (lora(), {"ss_network_alpha": "1"}, "ss_network_alpha 1"),
    (lora(), {"lora_alpha": "8"}, "lora_alpha 8"),
    (
        lora(rank=2),
        {OWN_ALPHA: "8", "ss_network_dim": "4", "ss_network_alpha": "4"},
        "about rank 4, and its tensors have",
    ),
]


@pytest.mark.parametrize(("tensors", "header", "why"), DOUBTED)
def test_a_header_about_other_tensors_makes_the_scale_unknown(
    tensors: dict[str, Tensor], header: dict[str, str], why: str
) -> None:
    found = fold_scale(tensors, header)
    assert why in found.doubt
    assert found.note == f"unknown: {found.doubt}; applied as it is stored, as ComfyUI does"
    assert found.tensors.keys() == tensors.keys()
    assert all(found.tensors[key] is tensor for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "header", "note"),
    [
        (lora(first=2.0, second=2.0), {"ss_network_alpha": "2", "ss_network_dim": "4"}, "0.5, alpha / rank as tensors"),
        ({**lora(first=2.0), f"transformer.{SECOND}.alpha": torch.tensor(8)}, {}, "0.5 to 2, "),
        (lora(first=2.0, second=8.0), {}, "0.5 to 2, alpha / rank as tensors"),
        (lora(first=2.0, second=2.0), diffusers(r=9, lora_alpha=1), "0.5, alpha / rank as tensors"),
        (lora(), diffusers(r=4, lora_alpha=8), "2, alpha / rank from the header"),
        (lora(), diffusers(r=4), "2, alpha / rank from the header"),  # peft's default alpha is 8
        (lora(rank=8), diffusers(lora_alpha=16), "2, alpha / rank from the header"),  # and its default rank
        (lora(), diffusers(r=4, lora_alpha=8, use_rslora=True), "4, alpha / rank from the header"),
        (lora(), diffusers(r=4, lora_alpha=4, alpha_pattern={"^transformer_blocks.0.attn.to_q": 8}), "1 to 2, "),
        (lora(), diffusers(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"]), "2, alpha / rank from the header"),
        (lora("base_model.model."), diffusers("", r=4, lora_alpha=8), "2, alpha / rank from the header"),
        (lora(), {"ss_network_alpha": "4", "ss_network_dim": "4"}, "1, alpha is the rank in its header"),
        (lora(), {"ss_network_alpha": "4.0"}, "1, alpha is the rank in its header"),
        (lora(), {"ss_network_alpha": "None", "ss_network_dim": "4"}, "1, the file states no alpha"),
        (lora(), {OWN_ALPHA: "8", "ss_network_dim": "4", "ss_network_alpha": "4"}, "1, alpha / rank is in the weights"),
    ],
)
def test_a_header_about_these_tensors_is_believed(
    tensors: dict[str, Tensor], header: dict[str, str], note: str
) -> None:
    found = fold_scale(tensors, header)
    assert found.doubt == ""
    assert found.note.startswith(note)


def test_text_encoder_layers_need_no_header() -> None:
    """They are left out, so that what is said of the denoiser's scale does not hang on them."""
    text = {
        f"text_encoder.text_model.mlp.fc1.lora_{half}.weight": torch.ones(size)
        for half, size in (("A", (2, 6)), ("B", (6, 2)))
    }
    assert fold_scale({**lora(), **text}, diffusers(r=4, lora_alpha=8)).note.startswith("2, ")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda"])
def test_an_adapter_of_an_altered_base_is_refused(start: str) -> None:
    with pytest.raises(UserError, match=f"was trained from {start}, on a base that is not the published one"):
        fold_scale(lora(), diffusers(r=4, lora_alpha=8, init_lora_weights=start))


def test_dora_without_its_magnitudes_is_refused() -> None:
    with pytest.raises(UserError, match="was trained as DoRA, and its magnitudes are not in it"):
        fold_scale(lora(), diffusers(r=4, lora_alpha=8, use_dora=True))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that people have, for the embedded model."""
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path / "made")])
    runpy.run_path(str(CASES), run_name="__main__")
    return tmp_path / "made"


def update_of(model: Model, path: Path) -> Tensor:
    """What a file adds to the query of the first layer."""
    layer = model.denoiser.get_submodule(FIRST)
    (found,) = [one for one in updates_for(model, read_adapter(path).usable.tensors) if one.layer is layer]
    return found.up @ found.down


def test_the_files_that_people_have(model: Model, made: Path) -> None:
    stored = update_of(model, made / "old_names.safetensors")
    torch.testing.assert_close(update_of(model, made / "norm_out.safetensors"), stored)
    torch.testing.assert_close(update_of(model, made / "renamed.safetensors"), stored)
    assert "scale is unknown: its header is about transformer.*" in refused(model, made / "renamed.safetensors")
    assert "1 bias difference (first: " in refused(model, made / "diff_b.safetensors")
    assert AdapterCard.of(read_adapter(made / "renamed.safetensors")).scale.startswith("unknown: its header is about")
    for name in ("norm_out", "old_names"):
        assert apply_adapter(load_model(CONFIG.model), made / f"{name}.safetensors", any_base=True).tensors


def refused(model: Model, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        apply_adapter(model, path, any_base=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_strength_that_is_given_is_taken(made: Path) -> None:
    """Twice what is stored, as the header seems to say."""
    models = [load_model(CONFIG.model) for _ in range(2)]
    apply_adapter(models[0], made / "renamed.safetensors", any_base=True, strength=2.0)
    plain = {**read_adapter(made / "renamed.safetensors").tensors}
    save_file(plain, made / "plain.safetensors")
    apply_adapter(models[1], made / "plain.safetensors", any_base=True, strength=2.0)
    x = torch.randn(3, 128)
    one, other = (model.denoiser.get_submodule(FIRST)(x) for model in models)
    assert torch.equal(one, other)


def test_dgpo_sample_counts_alpha_asks_for_a_scale_and_names_what_it_leaves_out(tmp_path: Path, made: Path) -> None:
    text = {"lora_te1_mlp_fc1.lora_down.weight": torch.ones(2, 8), "lora_te1_mlp_fc1.lora_up.weight": torch.ones(8, 2)}
    save_file({**lora(first=2.0, second=2.0), **text}, tmp_path / "half.safetensors")
    save_file(lora(), tmp_path / "stored.safetensors")

    def sample(file: Path, *options: str) -> tuple[int, str, bytes]:
        picture = tmp_path / "out.png"
        command = ["sample", "shapes", "--prompt", "a red circle", "--count", "1", "--steps", "2", "--any-base"]
        done = CliRunner().invoke(main, [*command, "--output", str(picture), "--adapter", str(file), *options])
        return done.exit_code, done.output, picture.read_bytes() if done.exit_code == 0 else b""

    code, said, counted = sample(tmp_path / "half.safetensors")
    assert code == 0, said
    assert "2 tensors for text encoders are left out" in said
    assert counted == sample(tmp_path / "stored.safetensors", "--strength", "0.5")[2]
    assert counted != sample(tmp_path / "stored.safetensors")[2]
    code, said, _ = sample(made / "renamed.safetensors")
    assert code == 2
    assert "give it as the strength (--strength), 1 for as it is stored" in said
    assert sample(made / "renamed.safetensors", "--strength", "2")[0] == 0


def test_the_same_scale_as_diffusers_for_headers_of_its_own(tmp_path: Path) -> None:
    """Saved and loaded by diffusers, with patterns and rslora; every layer's update is the same."""
    model: Any = load_model(CONFIG.model)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "alpha_pattern": {FIRST: 2},
        "target_modules": [FIRST, SECOND],
    }
    type(model.pipeline).save_lora_weights(
        tmp_path,
        transformer_lora_layers={key.removeprefix("transformer."): tensor for key, tensor in lora().items()},
        transformer_lora_adapter_metadata=settings,
    )
    names = {module: name for name, module in model.denoiser.named_modules()}
    updates = updates_for(model, read_adapter(tmp_path).usable.tensors)
    ours = {names[update.layer]: update.up @ update.down for update in updates}
    model.pipeline.load_lora_weights(str(tmp_path))
    for name in (FIRST, SECOND):
        layer = model.denoiser.get_submodule(name)
        torch.testing.assert_close(ours[name], layer.get_delta_weight("default_0").detach(), rtol=1e-4, atol=1e-4)


def test_a_word_of_a_caption_is_no_alpha() -> None:
    header = {"ss_tag_frequency": '{"10_x": {"alpha": 3}}', "adapter_config": '{"r": 4, "lora_alpha": 4}'}
    folded = fold_scale(lora(rank=4), header)
    assert (folded.doubt, folded.note) == ("", "1, alpha is the rank in its header (adapter_config's alpha)")
