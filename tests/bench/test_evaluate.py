"""What every run is measured by: a base that is good but imperfect, and metrics that see the adapter alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dgpo_bench.commands import main
from dgpo_bench.evaluate import make_evaluator
from dgpo_bench.preset import load_preset
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.conftest import spread


@pytest.mark.slow
def test_base_accuracy_is_between_half_and_seven_tenths() -> None:
    policy = Policy(load_model(ModelConfig(path="shapes", max_sequence_length=1)), LoraConfig(rank=1), seed=0)
    preset = load_preset("shapes")
    evaluator = make_evaluator(preset.evaluation, preset.sizes["default"], policy)
    metrics = evaluator.measure(policy, policy.copy_weights(), guidance=1)
    assert 0.5 <= metrics["accuracy"] <= 0.7
    by_task = {task: metrics[f"accuracy_{task}"] for task in evaluator.tasks}
    assert len(by_task) == 5
    assert min(by_task.values()) > 0.2
    assert metrics["ood_accuracy"] > 0.2


@pytest.mark.fast
def test_evaluation_leaves_the_policy_alone_and_drift_sees_the_adapter(policy: Policy) -> None:
    preset = load_preset("shapes")
    plan = preset.evaluation.model_copy(update={"images_per_prompt": 2, "steps": 2})
    size = preset.sizes["quick"].model_copy(update={"prompts_per_task": 1, "out_of_domain_prompts": 1})
    evaluator = make_evaluator(plan, size, policy)
    before = policy.copy_weights()
    changed = evaluator.measure(policy, before)
    untouched = evaluator.measure(policy, {name: torch.zeros_like(weight) for name, weight in before.items()})
    assert changed["drift"] > 100 * max(untouched["drift"], 1e-12)
    assert untouched["drift"] < 1e-9
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.parameters.items())
    assert evaluator.measure(policy, before) == changed


@pytest.mark.fast
def test_metrics_that_are_known_are_not_measured_again(policy: Policy) -> None:
    preset = load_preset("shapes")
    plan = preset.evaluation.model_copy(update={"images_per_prompt": 2, "steps": 1})
    size = preset.sizes["quick"].model_copy(update={"prompts_per_task": 1, "out_of_domain_prompts": 1})
    evaluator = make_evaluator(plan, size, policy)
    guided = evaluator.measure_guided(policy, policy.copy_weights(), [1, 2], {2: {"accuracy": 0.25}})
    assert [each.guidance for each in guided] == [1, 2]
    assert guided[0].metrics == evaluator.measure(policy, policy.copy_weights(), guidance=1)
    assert guided[1].metrics == {"accuracy": 0.25}


@pytest.mark.fast
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
    config = load_preset("shapes").run_config("dgpo", 0)
    facts = TrainingFacts(config, optimizer_steps=1)
    export_adapter(policy, policy.copy_weights(), path, facts)
    options = [str(tmp_path / "own.yaml"), "--adapter", str(path), "--output", str(out)]
    result = CliRunner().invoke(main, ["evaluate", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["drift"] > 0.001
