"""The table of metrics names every key that a record has, and none that no record has."""

from __future__ import annotations

import pytest

from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.metrics import keys, metrics_of
from tests.dgpo_plugin.algorithm_cases import config_for

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_table_is_what_two_iterations_write(algorithm: str) -> None:
    config = config_for(algorithm)
    always, sometimes = keys(algorithm, list(config.rewards) if len(config.rewards) > 1 else [])
    for record in build_trainer(config).iterations():
        assert always <= set(record), "a key of the table that is not written"
        assert set(record) <= always | sometimes, "a key that the table does not have"


def test_several_rewards_have_their_own_keys() -> None:
    several = ["rewards={shapes: 1, brightness: 0.5}", "training.iterations=1"]
    (record,) = build_trainer(config_for("dgpo", *several)).iterations()
    always, _ = keys("dgpo", ["shapes", "brightness"])
    assert set(record) == always | {"velocity_growth"}  # this one's loss looks at the base
    assert {"reward/shapes", "constant_groups/brightness"} <= always


def test_the_prompts_that_are_encoded_on_the_way_have_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgpo_plugin.training.prompt_groups.TEXTS_AT_ONCE", 4)
    (record,) = build_trainer(config_for("dgpo", "training.iterations=1")).iterations()
    always, sometimes = keys("dgpo")
    assert set(record) == always | sometimes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_metric_says_all_of_itself(algorithm: str) -> None:
    metrics = metrics_of(algorithm)
    assert len({metric.key for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.unit
        assert metric.how.endswith(".")
        assert metric.healthy.endswith(".")
