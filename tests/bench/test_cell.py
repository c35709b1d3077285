"""One cell of a comparison, killed half way: it goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dgpo_bench.base import measure_base
from dgpo_bench.cell import run_cell
from dgpo_bench.kept import check_kept
from dgpo_bench.pictures import PICTURES_FILE, read_pictures
from dgpo_bench.plan import Event, Forecast, Plan, base_file, cell_file, run_folder
from dgpo_bench.preset import load_preset
from dgpo_bench.records import KEPT_FOLDER
from dgpo_bench.written import base_pictures_file, read_cell
from dgpo_plugin.common.errors import UserError
from tests.bench.test_compare import EVALUATIONS, small_preset


class Killed(BaseException):
    """Stands for SIGKILL."""


class Ear:
    """A listener that notes, and kills after so many evaluations."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.heard: list[Event] = []
        self._kill_after = kill_after

    def expect(self, forecast: Forecast) -> None:
        raise AssertionError("a cell forecasts nothing")

    def listen(self, event: Event) -> None:
        self.heard.append(event)
        if not event.evaluated and sum(each.evaluated for each in self.heard) == self._kill_after:
            raise Killed


def measured_twice(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """Two folders of a comparison in which the base is measured, and no cell is done."""
    whole, broken = folder / "whole", folder / "broken"
    measure_base(plan, whole)
    broken.mkdir()
    for file in (base_file(whole), base_pictures_file(whole)):
        shutil.copy(file, broken / file.name)
    return whole, broken


@pytest.mark.slow
def test_a_cell_killed_half_way_goes_on_from_its_last_evaluation(tmp_path: Path) -> None:
    """Equal evaluations make it exact: adapter and pictures are those of a cell that was not killed, bit for bit."""
    preset, task = load_preset(small_preset(tmp_path))
    plan = Plan.of("small", preset, task, "quick", preset.sized("quick", 1, EVALUATIONS), ["dgpo"], jobs=1)
    plan = plan.model_copy(update={"keep_pictures": True})
    whole, broken = measured_twice(plan, tmp_path)
    run_cell(plan, whole, "dgpo", 0, Ear())
    with pytest.raises(Killed):
        run_cell(plan, broken, "dgpo", 0, Ear(kill_after=1))
    assert not cell_file(broken, "dgpo", 0).exists()
    ear = Ear()
    run_cell(plan, broken, "dgpo", 0, ear)
    assert sum(event.evaluated for event in ear.heard) == 1  # the last; the one before is kept
    folders = [run_folder(folder, "dgpo", 0) for folder in (whole, broken)]
    timed = {"seconds"}
    done = [
        [each.model_dump(exclude=timed) for each in read_cell(folder / "cell.json").checkpoints] for folder in folders
    ]
    assert done[0] == done[1]
    tables = [read_pictures(folder / PICTURES_FILE) for folder in folders]
    assert len(tables[0]) == len(tables[1]) > 0
    for name in tables[0].metrics:
        np.testing.assert_array_equal(tables[0].metrics[name], tables[1].metrics[name])
    assert tables[0].sha256 is not None
    np.testing.assert_array_equal(tables[0].sha256, tables[1].sha256)
    for folder, table in zip((whole, broken), tables, strict=True):
        assert len(table.kept()) == len(table)
        check_kept(table, folder / KEPT_FOLDER)
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["reward"] for line in lines[0]] == [line["reward"] for line in lines[1]]
    adapters = [load_file(folder / "adapter.safetensors") for folder in folders]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not (folders[1] / "checkpoints").exists()


@pytest.mark.fast
def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text("{")
    with pytest.raises(UserError, match=r"cell\.json: not a finished cell; remove it"):
        read_cell(tmp_path / "cell.json")
