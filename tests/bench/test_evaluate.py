"""What every cell is measured by: a base that is good but imperfect, and numbers that see the adapter alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dgpo_bench.evaluate import Evaluator, Subject, headline, make_evaluator
from dgpo_bench.measures import load_measures
from dgpo_bench.pictures import Pictures
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import TEST, VALIDATION, sampled_sets
from dgpo_bench.records import read_results
from dgpo_bench.size import Size
from dgpo_plugin.config.fields import LoraConfig, ModelConfig, ScoringConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.bench.test_compare import small_preset
from tests.bench.test_finished_adapters import evaluate, exported

SMALL = {
    "test_prompts": 2,
    "validation_prompts": 1,
    "out_of_domain_prompts": 2,
    "images_per_prompt": 2,
    "curve_prompts": 1,
}


def make(policy: Policy, steps: int, **size: Any) -> Evaluator:
    """The evaluator of shapes with a size of its own."""
    _, task = load_preset("shapes")
    sets = sampled_sets(task, Size(evaluations=1, **size))
    return make_evaluator(policy, sets, load_measures(task, ScoringConfig(), {}), steps=steps, guidance=1)


@pytest.mark.slow
def test_the_base_is_good_but_imperfect_without_guidance() -> None:
    policy = Policy(load_model(ModelConfig(path="shapes", max_sequence_length=1)), LoraConfig(rank=1), seed=0)
    evaluator = make(policy, 10, test_prompts=12, out_of_domain_prompts=25)
    with policy.as_reference():
        rows = evaluator.finished(policy, Subject(), 1, None)
    test = evaluator.sets[TEST]
    found = rows.where(rows.set == TEST)
    tags = np.array(test.tags)[found.prompt]
    assert len(set(test.tags)) == 5
    for kind in ("counting", "colour_attribution"):  # those of more than two prompts
        assert 0.2 < found.metrics["accuracy"][tags == kind].mean() < 0.8
    assert 0.35 <= headline(found, test, "accuracy", 1) <= 0.6
    assert rows.where(rows.set == "shapes/out-of-domain").metrics["accuracy"].mean() > 0.2


@pytest.mark.fast
def test_evaluation_leaves_the_policy_alone_and_drift_sees_the_adapter(policy: Policy) -> None:
    evaluator, before = make(policy, 2, **SMALL), policy.copy_weights()
    with policy.with_weights(before):
        changed, drift = evaluator.curve(policy, Subject("a", 0, 1), 1), evaluator.drift(policy)
    with policy.with_weights({name: torch.zeros_like(weight) for name, weight in before.items()}):
        untouched = evaluator.drift(policy)
    assert untouched < 1e-9
    assert drift > 100 * max(untouched, 1e-12)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.parameters.items())
    with policy.with_weights(before):
        again = evaluator.curve(policy, Subject("a", 0, 1), 1)
    for name in changed.metrics:
        np.testing.assert_array_equal(again.metrics[name], changed.metrics[name])
    assert not any(parameter.grad is not None for parameter in policy.parameters.values())


@pytest.mark.fast
def test_what_the_curve_has_measured_is_not_measured_again(policy: Policy) -> None:
    evaluator, subject = make(policy, 1, **SMALL), Subject("a", 0, 1)
    with policy.as_reference():
        curve = evaluator.curve(policy, subject, 1)
        rest = evaluator.finished(policy, subject, 1, 1)
        whole = evaluator.finished(policy, subject, 1, None)
        elsewhere = evaluator.finished(policy, subject, 2, 1)
    assert len(curve) + len(rest) == len(whole) == len(elsewhere)
    joined = {(s, p, i) for part in (curve, rest) for s, p, i in zip(part.set, part.prompt, part.image, strict=True)}
    assert len(joined) == len(whole)


@pytest.mark.fast
def test_the_best_guidance_is_chosen_on_validation_pictures_by_the_headline(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(policy, 1, **SMALL)
    values = {1.0: 0.5, 2.0: 0.7, 3.0: 0.7, 4.5: 0.6}
    asked: list[tuple[str, Sequence[int] | None]] = []

    def measured(
        self: Evaluator, policy: Policy, subject: Subject, name: str, guidance: float, images: Sequence[int] | None
    ) -> Pictures:
        asked.append((name, images))
        count = 2 * len(self.sets[name].prompts)
        prompts = np.repeat(np.arange(count // 2), 2)
        one, text = np.zeros(count, dtype=np.int64), np.full(count, name)
        metrics = {"accuracy": np.full(count, values[guidance])}
        return Pictures(text, one, one, np.full(count, guidance), text, prompts, one, metrics)

    monkeypatch.setattr(Evaluator, "measure", measured)
    best, rows = evaluator.best_guidance(policy, Subject(), [1.0, 2.0, 3.0, 4.5], "accuracy", 1)
    assert (best, set(asked), len(rows)) == (2.0, {(VALIDATION, None)}, 8 * len(evaluator.sets[VALIDATION].prompts))
    record = evaluator.measures["accuracy"].record.model_copy(update={"better": "lower"})
    measures = {**evaluator.measures, "accuracy": replace(evaluator.measures["accuracy"], record=record)}
    best, _ = replace(evaluator, measures=measures).best_guidance(policy, Subject(), [1.0, 2.0], "accuracy", 1)
    assert best == 1.0
    asked.clear()
    evaluator.best_guidance(policy, Subject(), [1.0, 2.0], "accuracy", 1, images=7)
    assert asked == [(VALIDATION, range(7))] * 2


@pytest.mark.fast
def test_the_headline_is_the_mean_over_prompts_of_kinds_with_enough_of_them(policy: Policy) -> None:
    validation = make(policy, 1, **SMALL).sets[VALIDATION]
    three = replace(validation, prompts=validation.prompts[:3], tags=["many", "many", "few"])
    prompt, values = np.array([0, 0, 1, 1, 2, 2]), np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    none = np.zeros(6, dtype=np.int64)
    rows = Pictures(none.astype(str), none, none, values, none.astype(str), prompt, none, {"m": values})
    assert headline(rows, three, "m", 2) == 0.75
    assert headline(rows, three, "m", 1) == 0.5
    assert headline(rows, three, "m", 9) == 0.5


@pytest.mark.fast
def test_an_adapter_is_evaluated_beside_quantized_weights(tmp_path: Path) -> None:
    path = Path(small_preset(tmp_path))
    values = yaml.safe_load(path.read_text())
    values["shared"]["model"] = {"path": "shapes", "max_sequence_length": 1, "quantization": "torchao-int8"}
    path.write_text(json.dumps(values))
    adapter, out = exported(tmp_path / "mine", 0.3), tmp_path / "out"
    result = evaluate(str(path), "--adapter", str(adapter), "--output", str(out))
    assert result.exit_code == 0, (result.output, result.exception)
    assert (read_results(out / "results.json").cells[0].checkpoints[-1].drift or 0) > 0.001
