"""One run of a comparison, killed half way: it goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgpo_bench.cell import evaluator_of, measure_base, run_cell
from dgpo_bench.plan import Event, Forecast, Plan, base_file, run_file, run_folder
from dgpo_bench.preset import load_preset
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.prompts.registry import load_prompts
from tests.bench.test_compare import EVALUATIONS, small_preset


class Killed(BaseException):
    """Stands for SIGKILL."""


class Ear:
    """A listener that notes, and kills after so many evaluations."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.heard: list[Event] = []
        self._kill_after = kill_after

    def expect(self, forecast: Forecast) -> None:
        raise AssertionError("a run forecasts nothing")

    def listen(self, event: Event) -> None:
        self.heard.append(event)
        if not event.evaluated and sum(each.evaluated for each in self.heard) == self._kill_after:
            raise Killed


@pytest.mark.slow
def test_a_run_killed_half_way_goes_on_from_its_last_evaluation(tmp_path: Path) -> None:
    """Equal evaluations make it exact: the adapter is that of a run that was not killed, bit for bit."""
    preset = load_preset(small_preset(tmp_path))
    plan = Plan.of("small", preset, "quick", preset.sized("quick", 1, EVALUATIONS), ["dgpo"], jobs=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    measure_base(plan, whole)
    broken.mkdir()
    shutil.copy(base_file(whole), base_file(broken))
    run_cell(plan, whole, "dgpo", 0, Ear())
    with pytest.raises(Killed):
        run_cell(plan, broken, "dgpo", 0, Ear(kill_after=1))
    assert not run_file(broken, "dgpo", 0).exists()
    ear = Ear()
    run_cell(plan, broken, "dgpo", 0, ear)
    assert sum(event.evaluated for event in ear.heard) == 1  # the last; the one before is kept
    folders = [run_folder(folder, "dgpo", 0) for folder in (whole, broken)]
    done = [json.loads((folder / "run.json").read_text())["evaluations"] for folder in folders]
    assert [e["metrics"] for e in done[0]] == [e["metrics"] for e in done[1]]
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["reward"] for line in lines[0]] == [line["reward"] for line in lines[1]]
    adapters = [load_file(folder / "adapter.safetensors") for folder in folders]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not (folders[1] / "checkpoints").exists()


@pytest.mark.fast
def test_a_held_out_set_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    preset = load_preset(small_preset(tmp_path))
    plan = Plan.of("small", preset, "quick", preset.sized("quick", 1, EVALUATIONS), ["dgpo"], jobs=1)
    prompts = load_prompts("shapes/held-out")
    config = SimpleNamespace(training=SimpleNamespace(micro_batch_size=None))
    trainer: Any = SimpleNamespace(groups=SimpleNamespace(prompts=prompts[:3]), config=config)
    with pytest.raises(UserError, match=rf"evaluation.held_out shapes/held-out: 3 of {len(prompts)} prompts are in"):
        evaluator_of(plan, trainer)
