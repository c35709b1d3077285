"""The shipped base is good but imperfect: there is something to learn, and something to lose."""

from __future__ import annotations

import pytest
import torch

from dgpo_bench.evaluate import make_evaluator
from dgpo_bench.preset import load_preset
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy


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
    untouched = evaluator.measure(policy, [torch.zeros_like(weight) for weight in before])
    assert changed["drift"] > 100 * max(untouched["drift"], 1e-12)
    assert untouched["drift"] < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))
    assert evaluator.measure(policy, before) == changed
