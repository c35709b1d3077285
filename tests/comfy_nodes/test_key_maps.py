"""The adapters of every family against ComfyUI's own key maps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.comfy_nodes import environment
from tests.comfy_nodes.server import Server
from tests.conftest import shapes_run
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.slow

KEYS = {
    "sd3": 62,
    "flux": 44,
    "flux2-dev": 40,
    "flux2-klein": 40,
    "qwen-image": 32,
    "z-image": 32,
    "sdxl": 64,
    "sd15": 64,
}
"""Families that ComfyUI's own loaders match whole, with the keys of our tiny one's adapter."""
UNKNOWN = dict.fromkeys(("flux2-dev", "flux2-klein"), "of layers that ComfyUI knows")
"""Families of which ComfyUI 0.30 knows no name for some layers (FLUX.2's modulations), and how that is refused."""


def matched(family: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What ComfyUI makes of two adapters for the family's tiny pipeline: on the default layers, and on all."""
    if family == "sd3":
        settings = ModelConfig(path="shapes", max_sequence_length=1)
    else:
        FAMILIES[family].build(folder / "model")
        settings = ModelConfig(path=str(folder / "model"), max_sequence_length=FAMILIES[family].tokens)
    model: Any = load_model(settings)
    layers = sorted(name for name, module in model.denoiser.named_modules() if isinstance(module, nn.Linear))
    adapters = []
    for name, targets in (("default", None), ("all", layers)):
        policy = Policy(load_model(settings), LoraConfig(rank=2, alpha=4, target_modules=targets), seed=0)
        adapters.append(folder / f"{name}.safetensors")
        facts = TrainingFacts(shapes_run(model=settings), 0)
        export_adapter(policy, policy.copy_weights(), adapters[-1], facts)
    denoiser = environment.ROOT / "dgpo_plugin/worlds/shapes/pipeline" if family == "sd3" else folder / "model"
    denoiser = denoiser / model.prefix
    command = [environment.PYTHON, Path(__file__).with_name("key_maps.py"), family]
    command += [denoiser / "diffusion_pytorch_model.safetensors", denoiser / "config.json", *adapters]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("family", KEYS)
def test_every_key_is_matched(server: Server, family: str, tmp_path: Path) -> None:
    done = matched(family, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    default, everywhere = json.loads(done.stdout)
    assert default["total"] == KEYS[family]
    if family in UNKNOWN:
        assert UNKNOWN[family] in everywhere["refused"]
    else:
        assert everywhere["total"] >= default["total"] + 4
    for found in (default, everywhere)[: 1 if family in UNKNOWN else 2]:
        assert found["unmatched"] == []
        assert found["comfyui"] == found["ours"] == found["total"]
        assert found["layers"] == found["total"] // 2
        if not family.startswith("flux2"):  # whose weights are made up there
            assert found["base"].endswith("; these very weights")


def test_sana_is_unknown_to_comfyui(server: Server, tmp_path: Path) -> None:
    """Its adapters are for diffusers; should ComfyUI learn Sana, this test asks for a row in KEYS."""
    base = (environment.SERVER / "comfy" / "model_base.py").read_text()
    assert "class Sana" not in base
    done = matched("sana", tmp_path)
    assert done.returncode != 0
    assert "no class of ComfyUI is sana's" in done.stderr
