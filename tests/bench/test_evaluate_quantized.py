"""`dgpo-bench evaluate` of an adapter whose base is quantized: a preset of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_bench.cli import main
from dgpo_bench.preset import load_preset
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.conftest import shapes_run, spread

pytestmark = pytest.mark.fast


def test_an_adapter_is_evaluated_beside_quantized_weights(tmp_path: Path) -> None:
    values = load_preset("shapes").model_dump(mode="json")
    values["shared"]["model"] = {"path": "shapes", "max_sequence_length": 1, "quantization": "torchao-int8"}
    values["evaluation"] |= {"images_per_prompt": 2, "steps": 2}
    values["sizes"]["default"] |= {"prompts_per_task": 1, "out_of_domain_prompts": 1}
    (tmp_path / "own.yaml").write_text(json.dumps(values))
    policy = spread(
        Policy(load_model(ModelConfig(path="shapes", max_sequence_length=1)), LoraConfig(rank=4, alpha=4), seed=0), 0.3
    )
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out.json"
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(shapes_run(), 1))
    options = [str(tmp_path / "own.yaml"), "--adapter", str(path), "--output", str(out)]
    result = CliRunner().invoke(main, ["evaluate", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["drift"] > 0.001
