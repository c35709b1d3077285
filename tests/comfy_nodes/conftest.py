"""One real ComfyUI server for all tests here, with the embedded model, adapters and rewards in its folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.models.policy import Policy
from tests.comfy_nodes import environment
from tests.comfy_nodes.server import Server
from tests.conftest import shapes_run, spread

SHAPES = world_pipeline("shapes")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LORA = LoraConfig(rank=4, alpha=8)
NOT_TESTED = "THE PACKAGE INDEX DOES NOT ANSWER: nothing was tested in the real ComfyUI"


@pytest.fixture(scope="session")
def cut_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline with the first and the last of its four layers: as many as heads, for UNETLoader."""
    folder = tmp_path_factory.mktemp("models") / "cut"
    shutil.copytree(SHAPES, folder)
    weights = load_file(SHAPES / WEIGHTS)
    kept = {
        key.replace("transformer_blocks.3.", "transformer_blocks.1."): value
        for key, value in weights.items()
        if not key.startswith(("transformer_blocks.1.", "transformer_blocks.2."))
    }
    config = {**diffusers.SD3Transformer2DModel.load_config(SHAPES / "transformer"), "num_layers": 2}
    transformer = diffusers.SD3Transformer2DModel.from_config(config)
    transformer.load_state_dict(kept)
    transformer.save_pretrained(folder / "transformer")
    return folder


def make_adapters(model: str, folder: Path, name: str) -> None:
    """Two files with the same effect: ``NAME.safetensors`` as we write it, ``NAME-old`` as diffusers and peft do."""
    policy = spread(Policy(load_model(ModelConfig(path=model, max_sequence_length=1)), LORA, seed=0), std=0.2)
    config = shapes_run(model=ModelConfig(path=model), lora=LORA)
    weights = policy.copy_weights()
    facts = TrainingFacts(config, 7, reward_before=0.25, reward_after=0.75)
    export_adapter(policy, weights, folder / f"{name}.safetensors", facts)
    layers = {
        policy.model.adapter_key(key).removeprefix("transformer."): weight.contiguous()
        for key, weight in weights.items()
    }
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        weight_name=f"{name}-old.safetensors",
        transformer_lora_adapter_metadata={"r": LORA.rank, "lora_alpha": int(LORA.alpha), "use_rslora": False},
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, cut_pipeline: Path) -> Path:
    """The server's folders."""
    base = tmp_path_factory.mktemp("comfyui")
    packs = base / "custom_nodes"
    packs.mkdir()
    (packs / "dgpo-plugin").symlink_to(environment.ROOT)
    shutil.copytree(environment.HERE / "neighbour", packs / "neighbour")
    models, loras, rewards = (base / "models" / name for name in ("diffusion_models", "loras", "dgpo_rewards"))
    for folder in (models, loras, rewards):
        folder.mkdir(parents=True)
    shutil.copy(SHAPES / WEIGHTS, models / "shapes.safetensors")
    shutil.copy(cut_pipeline / WEIGHTS, models / "cut.safetensors")
    make_adapters("shapes", loras, "shapes")
    make_adapters(str(cut_pipeline), loras, "cut")
    foreign = {
        "transformer.nowhere.lora_A.weight": torch.ones(1, 4),
        "transformer.nowhere.lora_B.weight": torch.ones(4, 1),
    }
    save_file(foreign, loras / "foreign.safetensors")
    shutil.copy(environment.HERE / "own_rewards.py", rewards / "mine.py")
    return base


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[Server]:
    """Running; made from nothing on a fresh machine."""
    try:
        environment.ensure()
    except environment.Unreachable as error:
        pytest.skip(f"{NOT_TESTED} ({error})")
    running = Server(base)
    try:
        yield running
    finally:
        running.stop()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A skip that nobody can overlook; from the reports, because the worker that skipped is another process."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    skipped = [reason for reason in reasons if NOT_TESTED in reason]
    if skipped:
        terminalreporter.section("NOT TESTED IN COMFYUI", sep="!", red=True, bold=True)
        terminalreporter.line("The package index does not answer, so the server could not be installed:")
        terminalreporter.line(skipped[0])
