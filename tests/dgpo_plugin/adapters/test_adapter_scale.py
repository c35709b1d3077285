"""The scale that a LoRA file means, against what peft does with the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, fold_scale
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.generate import fixed_noise
from dgpo_plugin.models.policy import Policy

pytestmark = pytest.mark.fast


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5, bias=False)
        self.second = nn.Linear(6, 5, bias=False)


def header(**settings: Any) -> dict[str, str]:
    return {DIFFUSERS_HEADER: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"r": 2, "lora_alpha": 4}, "2, "),
        ({"r": 2, "lora_alpha": 1}, "0.5, "),
        ({"r": 4, "lora_alpha": 4, "use_rslora": True}, "2, "),
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"second": 6}}, "2 to 3, "),
        ({"r": 2, "lora_alpha": 4, "rank_pattern": {"first": 4}}, "1 to 2, "),
    ],
)
def test_the_header_is_read_as_peft_reads_it(settings: dict[str, Any], shown: str) -> None:
    torch.manual_seed(0)
    plain = Two()
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["first", "second"], **settings))
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B["default"].weight)
        tensors[f"transformer.{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach()
        tensors[f"transformer.{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach()
        updates[name] = layer.get_delta_weight("default").detach()
    found = fold_scale(tensors, header(**settings))
    scaled = found.tensors
    assert found.note.startswith(shown)
    for name, update in updates.items():
        ours = scaled[f"transformer.{name}.lora_B.weight"] @ scaled[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(ours, update)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "alpha_pattern": {"second": 16}},
    ],
)
def test_a_folder_of_pefts_has_its_alpha_beside_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """Saved by peft itself; its update is what peft computes."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Two(), peft.LoraConfig(target_modules=["first", "second"], **settings))
    updates: dict[str, Tensor] = {}
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B["default"].weight)
        updates[name] = layer.get_delta_weight("default").detach()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    usable = read_adapter(file).usable
    scaled = usable.tensors
    assert "adapter_config.json" in usable.note
    for name, update in updates.items():
        keys = [f"base_model.model.{name}.lora_{half}.weight" for half in "BA"]
        torch.testing.assert_close(scaled[keys[0]] @ scaled[keys[1]], update)
    assert AdapterCard.of(read_adapter(file)).scale == usable.note
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read"):
        read_adapter(file)
    (tmp_path / "adapter_config.json").unlink()
    assert read_adapter(file).usable.doubt == "peft keeps alpha in adapter_config.json, which is not beside it"


def test_alpha_tensors_are_left_to_the_loader() -> None:
    tensors = {
        "a.lora_down.weight": torch.ones(2, 3),
        "a.lora_up.weight": torch.ones(3, 2),
        "a.alpha": torch.tensor(4.0),
    }
    same = fold_scale(tensors, header(r=2, lora_alpha=8))
    assert all(torch.equal(same.tensors[key], tensors[key]) for key in tensors)
    assert same.note.startswith("2, alpha / rank as tensors")


def test_a_file_without_alpha_is_as_it_is() -> None:
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
    same = fold_scale(tensors, {})
    assert all(torch.equal(same.tensors[key], tensors[key]) for key in tensors)
    assert same.note == "1, the file states no alpha"


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"lora_alpha": "many"}', '{"alpha_pattern": {"(": 1}}', '{"alpha_pattern": 3}']
)
def test_a_header_that_cannot_be_read_is_an_error(text: str) -> None:
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(UserError, match="^lora_adapter_metadata in its header"):
        fold_scale(tensors, {DIFFUSERS_HEADER: text})


def test_an_old_file_is_applied_at_its_own_strength(policy: Policy, tmp_path: Path, small_config: Any) -> None:
    """The same adapter, written by us and as diffusers writes it, gives the same velocities."""
    import diffusers

    weights = policy.copy_weights()
    ours = tmp_path / "ours.safetensors"
    export_adapter(policy, weights, ours, TrainingFacts(small_config, 1))
    layers = {
        policy.model.adapter_key(name).removeprefix("transformer."): weight.contiguous()
        for name, weight in weights.items()
    }
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        weight_name="old.safetensors",
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 8},
    )
    models = [load_model(ModelConfig(path="shapes", max_sequence_length=1)) for _ in range(2)]
    noise, asked = fixed_noise(models[0], range(2), 0), models[0].encode(["a red circle"])[[0, 0]]
    before = models[0].velocity(noise, 0.5, asked)
    apply_adapter(models[0], ours)
    apply_adapter(models[1], tmp_path / "old.safetensors", any_base=True)
    one, other = (model.velocity(noise, 0.5, asked) for model in models)
    torch.testing.assert_close(one, other)
    assert (one - before).abs().max() > 0.01
    assert AdapterCard.of(read_adapter(tmp_path / "old.safetensors")).scale.startswith(
        "2, alpha / rank from the header"
    )
    assert DIFFUSERS_HEADER in read_adapter(tmp_path / "old.safetensors").header
