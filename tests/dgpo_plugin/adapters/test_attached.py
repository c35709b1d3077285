"""Adapters beside weights that cannot take them: packed ones, and half-precision ones that would round them away."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor

from dgpo_plugin.adapters.layers import Update, attached
from dgpo_plugin.adapters.load import apply_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config import load as config_files
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.generate import fixed_noise
from dgpo_plugin.models.policy import Policy
from tests.conftest import shapes_run, spread
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast

LORA = LoraConfig(rank=4, alpha=4)
BF16 = """
import torch
x = torch.ones(64, 128, dtype=torch.bfloat16)
torch.nn.functional.linear(x, torch.ones(128, 128, dtype=torch.bfloat16))
"""


def model_of(**options: Any) -> Any:
    return load_model(ModelConfig(path="shapes", max_sequence_length=1, **options))


def trained(path: Path, std: float, **options: Any) -> Policy:
    """A policy and its adapter's file."""
    policy = spread(Policy(model_of(**options), LORA, seed=0), std)
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(shapes_run(), 1))
    return policy


def velocities(thing: Any) -> Tensor:
    model = thing.model if isinstance(thing, Policy) else thing
    with torch.no_grad():
        return torch.Tensor(
            thing.velocity(fixed_noise(model, range(4), 0), 0.7, model.encode(["a red circle"])[[0] * 4])
        )


def test_an_adapter_goes_beside_quantized_weights(tmp_path: Path) -> None:
    """At the strength asked for, and strictly as ever."""
    path = tmp_path / "adapter.safetensors"
    policy = trained(path, 0.1, quantization="torchao-int8")
    base, attached, half = (model_of(quantization="torchao-int8") for _ in range(3))
    packed = attached.denoiser.transformer_blocks[0].attn.to_q.weight
    assert type(packed).__module__.startswith("torchao")
    apply_adapter(attached, path)
    apply_adapter(half, path, strength=0.5)
    torch.testing.assert_close(velocities(attached), velocities(policy), rtol=1e-4, atol=1e-4)
    assert (velocities(attached) - velocities(base)).abs().max() > 0.05
    for name, parameter in policy.model.denoiser.named_parameters():
        if name.endswith("lora_B.policy.weight"):
            parameter.data.mul_(0.5)
    torch.testing.assert_close(velocities(half), velocities(policy), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="match no weight"):
        apply_adapter(
            load_model(ModelConfig(quantization="torchao-int8", path=str(other(tmp_path)))), path, any_base=True
        )


def other(folder: Path) -> Path:
    """A pipeline with layers of other sizes."""

    FAMILIES["flux"].build(folder / "flux")
    return folder / "flux"


def test_packed_weights_are_told_by_their_layers_sizes(tmp_path: Path) -> None:
    """As bitsandbytes packs four bits: a column of bytes, on a layer that knows its inputs and outputs."""
    path = tmp_path / "adapter.safetensors"
    policy = trained(path, 0.1)
    model = model_of()
    for module in [module for module in model.denoiser.modules() if isinstance(module, torch.nn.Linear)]:
        vars(module)["forward"] = partial(torch.nn.functional.linear, weight=module.weight, bias=module.bias)
        packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
        module.weight = torch.nn.Parameter(packed, requires_grad=False)
    apply_adapter(model, path)
    torch.testing.assert_close(velocities(model), velocities(policy), rtol=1e-4, atol=1e-4)


@pytest.fixture
def quantized_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A training preset of one's own, by name."""
    names = config_files.preset_names()
    values = yaml.safe_load(names["shapes"].read_text())
    values["model"] = {"path": "shapes", "max_sequence_length": 1, "quantization": "torchao-int8"}
    (tmp_path / "int8.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(config_files, "preset_names", lambda: {**names, "int8": tmp_path / "int8.yaml"})
    return "int8"


def test_dgpo_sample_draws_with_a_quantized_base(tmp_path: Path, quantized_preset: str) -> None:
    trained(tmp_path / "adapter.safetensors", 0.3, quantization="torchao-int8")
    shown = {}
    for name, more in (("base", []), ("adapter", ["--adapter", str(tmp_path / "adapter.safetensors")])):
        shown[name] = tmp_path / f"{name}.png"
        options = ["--prompt", "a red circle", "--count", "2", "--steps", "4", "--output", str(shown[name]), *more]
        result = CliRunner().invoke(main, ["sample", quantized_preset, *options])
        assert result.exit_code == 0, result.output
    assert shown["base"].read_bytes() != shown["adapter"].read_bytes()


def test_a_small_update_is_not_rounded_away_in_bf16(tmp_path: Path) -> None:
    """Merging would leave nearly all weights as they are; attached, the velocities are the policy's own, bit by bit."""
    if subprocess.run([sys.executable, "-c", BF16], capture_output=True, check=False).returncode:
        pytest.skip("this processor traps bf16 products")
    path = tmp_path / "adapter.safetensors"
    policy = trained(path, 1e-4, precision="bf16")
    base, attached = model_of(precision="bf16"), model_of(precision="bf16")
    apply_adapter(attached, path)
    kept = total = 0
    for name, module in policy.model.denoiser.named_modules():
        if name.endswith("attn.to_q"):
            update = (module.lora_B["policy"].weight @ module.lora_A["policy"].weight).detach()
            weight = module.base_layer.weight
            kept += int((weight + update.to(weight) == weight).sum())
            total += weight.numel()
    assert kept > 0.95 * total
    assert torch.equal(velocities(attached), velocities(policy))
    assert not torch.equal(velocities(attached), velocities(base))


@pytest.mark.parametrize("layer", [torch.nn.Linear(4, 6), torch.nn.Conv2d(4, 6, 1)])
def test_an_adapter_is_taken_away_again_and_is_nothing_at_strength_0(layer: torch.nn.Module) -> None:
    convolution = isinstance(layer, torch.nn.Conv2d)
    given = torch.randn(2, 4, 3, 3) if convolution else torch.randn(2, 4)
    down, up = (
        (torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1)) if convolution else (torch.randn(2, 4), torch.randn(6, 2))
    )
    update, base = Update(layer, down, up), layer(given)
    found: dict[float, Tensor] = {}
    for strength in (0.0, 0.5, 1.0, 0.5):
        with attached([update], strength):
            found.setdefault(strength, layer(given))
            assert torch.equal(layer(given), found[strength])
        assert torch.equal(layer(given), base)
    assert torch.equal(found[0.0], base)
    torch.testing.assert_close(found[1.0] - base, 2 * (found[0.5] - base), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError), attached([update], 1.0):
        raise RuntimeError
    assert torch.equal(layer(given), base)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(4, 6, 1),
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1),
        torch.nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False),
    ],
)
def test_a_convolutions_update_is_that_of_the_merged_weight(layer: torch.nn.Conv2d) -> None:
    down, up = torch.randn(2, 4, *layer.kernel_size), torch.randn(6, 2, 1, 1)
    pictures = torch.randn(2, 4, 9, 9)
    merged = copy.deepcopy(layer)
    merged.weight.data += 0.5 * torch.einsum("or,rihw->oihw", up.flatten(1), down)
    Update(layer, down, up).attach(0.5)
    torch.testing.assert_close(layer(pictures), merged(pictures), rtol=1e-4, atol=1e-4)
