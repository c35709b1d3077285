"""What is told before a model is loaded is told before anything that takes seconds to import has been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgpo_plugin.config.load import preset_names
from tests.imports import imported_by

pytestmark = pytest.mark.fast


def test_reading_configurations() -> None:
    read = "from dgpo_plugin.config.load import load_config\nfor name in sys.argv[1:]: load_config(name)"
    assert imported_by(read, *preset_names()) == ("", [])


def test_inspecting_an_adapter(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}, file)
    inspect = "from dgpo_plugin.commands.main import main\nmain(sys.argv[1:], standalone_mode=False)"
    printed, modules = imported_by(inspect, "inspect", str(file))
    assert "rank" in printed
    assert modules == []
