"""Finished adapters and trials on several real processes (gloo): they find what one does; and what is refused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dgpo_bench import commands
from dgpo_bench import tune as tuning_module
from dgpo_bench.adapters import evaluate_adapters
from dgpo_bench.commands import main
from dgpo_bench.pictures import PICTURES_FILE, read_pictures
from dgpo_bench.plan import Plan
from dgpo_bench.preset import Range
from dgpo_bench.tune import run_trial, tune
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.bench.test_cell_processes import compare_tables, small_plan
from tests.bench.test_finished_adapters import exported
from tests.bench.test_workers import Ear
from tests.conftest import shapes_run, spread


def adapters_plan(folder: Path, processes: int, **adapters: Path) -> Plan:
    plan = small_plan(folder, processes)
    named = {name: str(path) for name, path in adapters.items()}
    return plan.model_copy(update={"entries": list(named), "adapters": named})


@pytest.mark.slow
def test_finished_adapters_are_measured_alike_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    mine = exported(tmp_path / "mine", 0.3)
    one, two = (adapters_plan(tmp_path, processes, mine=mine) for processes in (1, 2))
    results = [evaluate_adapters(plan, tmp_path / f"out-{plan.processes}") for plan in (one, two)]
    assert [result.cells[0].processes for result in results] == [1, 2]
    assert results[0].cells[0].guidance == results[1].cells[0].guidance
    assert results[1].command == results[0].command + " --processes 2"
    tables = [read_pictures(tmp_path / f"out-{number}" / PICTURES_FILE) for number in (2, 1)]
    compare_tables(tables[0], tables[1], tolerance=1e-3)
    assert set(tables[0].entry) == {"base", "mine"}


@pytest.mark.slow
def test_a_trial_finds_on_two_processes_what_it_does_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    plan = small_plan(tmp_path, 2)
    search = {"dgpo": {"training.learning_rate": Range(choices=(1.0e-3,))}}
    plan = plan.model_copy(update={"preset": plan.preset.model_copy(update={"search": search})})
    (trial,) = tune(plan, tmp_path, 1, Ear()).done()
    value, evaluations = run_trial(plan.spread(1, 1), tmp_path, "dgpo", 0, Ear())
    assert trial.value == pytest.approx(value, abs=0.01)
    assert trial.denoiser_evaluations == evaluations > 0


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "shapes", "--base"], ["tune", "shapes", "--algorithms", "dgpo"]],
    ids=["evaluate", "tune"],
)
def test_more_processes_than_images_are_refused_before_anything_is_done(arguments: list[str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out"), "--processes", "33"]
    result = CliRunner().invoke(main, [*arguments, *output])
    assert result.exit_code == 2, result.output
    assert "error: --processes 33: " in result.stderr
    assert "33 processes for 4 x 8 images an iteration" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_the_commands_hand_the_processes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Plan] = []

    def stop(plan: Plan, *_: Any) -> None:
        asked.append(plan)
        raise UserError("enough")

    monkeypatch.setattr("dgpo_bench.adapters.evaluate_adapters", stop)
    monkeypatch.setattr(tuning_module, "tune", stop)
    monkeypatch.setattr(commands, "_draw", lambda _: [])
    for arguments in (["evaluate", "shapes", "--base"], ["tune", "shapes"]):
        result = CliRunner().invoke(main, [*arguments, "--processes", "2", "--output", str(tmp_path / "out")])
        assert "enough" in result.stderr
    assert [plan.processes for plan in asked] == [2, 2]


@pytest.mark.fast
def test_another_base_is_told_before_the_base_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgpo_bench.base.build_trainer", None)  # would be called to measure it
    model = load_model(ModelConfig(path="words", max_sequence_length=1))
    policy = spread(Policy(model, LoraConfig(rank=4, alpha=4), seed=0), 0.1)
    other = tmp_path / "adapter.safetensors"
    export_adapter(policy, policy.copy_weights(), other, TrainingFacts(shapes_run(), optimizer_steps=1))
    right = exported(tmp_path / "right", 0.1)
    with pytest.raises(UserError, match=r"adapter\.safetensors: "):
        evaluate_adapters(adapters_plan(tmp_path, 1, right=right, other=other), tmp_path / "out")
    assert not (tmp_path / "out" / "base.json").exists()
