"""A model and a good adapter for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dgpo_plugin.adapters import TrainingFacts, export_adapter
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.load import load_model
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.adapters.adapter_files import CONFIG


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(CONFIG.model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = Policy(load_model(CONFIG.model), CONFIG.lora, seed=0)
    path = tmp_path_factory.mktemp("good") / "adapter.safetensors"
    weights = {name: torch.randn_like(parameter) for name, parameter in policy.parameters.items()}
    export_adapter(policy, weights, path, TrainingFacts(CONFIG, 1))
    return path
