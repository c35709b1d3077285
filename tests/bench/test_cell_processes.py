"""A cell on several real processes (gloo): what one finds, in the same order; and whose end is told when one dies."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dgpo_bench import compare as comparing
from dgpo_bench.asked import asked_plan, check_split
from dgpo_bench.base import measure_base
from dgpo_bench.cell import run_cell
from dgpo_bench.claim import claim_folder, plan_of
from dgpo_bench.pictures import KEYS, PICTURES_FILE, Pictures, read_pictures
from dgpo_bench.plan import Plan, base_file, cell_file, run_folder
from dgpo_bench.preset import load_preset
from dgpo_bench.worker_process import Job
from dgpo_bench.written import base_pictures_file, read_base, read_cell, write_failed
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.distributed.processes import Processes
from tests.bench.test_cell import Ear, Killed
from tests.bench.test_compare import small_preset
from tests.bench.test_workers import do_all, done

CLOSE = 1e-3
"""Of the adapter's norm, as for runs of different numbers of processes (tests/dgpo_plugin/distributed)."""


def small_plan(folder: Path, processes: int = 1) -> Plan:
    preset, task = load_preset(small_preset(folder))
    shared = {**preset.shared, "model": {**preset.shared["model"], "precision": "fp32"}}
    preset = preset.model_copy(update={"shared": shared})
    size = preset.sized("quick", 1, 800)  # three iterations
    plan = Plan.of("small", preset, task, "quick", size, ["dgpo"], jobs=1).spread(1, processes)
    return plan.model_copy(update={"threads": 1})


def compare_tables(found: Pictures, expected: Pictures, tolerance: float) -> None:
    """Check that the rows are the same pictures in the same order, and their metrics close."""
    for key in KEYS:
        np.testing.assert_array_equal(getattr(found, key), getattr(expected, key))
    assert list(found.metrics) == list(expected.metrics)
    for name, column in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], column, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_go_on_with_what_one_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base on two; and a cell, killed on one process after its first evaluation, goes on on two."""
    one, two = small_plan(tmp_path), small_plan(tmp_path, 2)
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    measure_base(one, whole)
    comparing.run_only(two, tmp_path / "base", "base", -1, Ear())
    base, of_one = (read_pictures(base_pictures_file(folder)) for folder in (tmp_path / "base", whole))
    compare_tables(base, of_one, 1e-4)
    assert read_base(tmp_path / "base") == read_base(whole)

    claim_folder(one, mixed)
    for file in (base_file(whole), base_pictures_file(whole)):
        shutil.copy(file, mixed / file.name)
    run_cell(one, whole, "dgpo", 0, Ear())
    with pytest.raises(Killed):
        run_cell(one, mixed, "dgpo", 0, Ear(kill_after=1))
    ear = Ear()
    with caplog.at_level(logging.WARNING):
        comparing.run_only(two, mixed, "dgpo", 0, ear)
    assert "was begun with 1 process a run, and goes on with 2 processes a run" in caplog.text
    assert sum(event.evaluated for event in ear.heard) == 1  # the last, and told by one process

    done, expected = (read_cell(cell_file(folder, "dgpo", 0)) for folder in (mixed, whole))
    assert (done.processes, expected.processes) == (2, 1)
    assert done.guidance == expected.guidance
    for found, point in zip(done.checkpoints, expected.checkpoints, strict=True):
        for cost in ("iteration", "steps", "denoiser_evaluations", "flops", "images_scored"):
            assert getattr(found, cost) == getattr(point, cost)
        assert found.drift == pytest.approx(point.drift, rel=0.01)
    folders = [run_folder(folder, "dgpo", 0) for folder in (mixed, whole)]
    table, whole_table = (read_pictures(folder / PICTURES_FILE) for folder in folders)
    compare_tables(table, whole_table, 1e-2)
    a, b = (load_file(folder / "adapter.safetensors") for folder in folders)
    apart = sum(float((a[name] - b[name]).square().sum()) for name in a)
    assert apart**0.5 <= CLOSE * sum(float(tensor.square().sum()) for tensor in b.values()) ** 0.5
    assert len((folders[0] / "metrics.jsonl").read_text().splitlines()) == done.checkpoints[-1].iteration


MEETING = """from dgpo_plugin.distributed.processes import join_processes
    import torch
    rank = join_processes().rank
    if seed == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    join_processes().sum(torch.ones(1))
    if rank == 1: return  # what is written is the first one's"""


@pytest.mark.slow
def test_a_process_that_dies_is_named_with_its_cell_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was left alone with the dead one says nothing of its own, whichever is heard first."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    told: dict[Job, str] = {}
    do_all(tmp_path, monkeypatch, MEETING, told.__setitem__, entries=["dgpo"], seeds=[0, 1], jobs=1, processes=2)
    assert done(tmp_path) == {"dgpo-seed1"}
    (died,) = told.values()
    assert died.startswith("dgpo, seed 0: its process 1 of 2 was ended by SIGKILL")
    assert died.endswith("what is finished is kept, and the same command goes on with the rest")
    assert len(died.splitlines()) == 1


@pytest.mark.fast
@pytest.mark.parametrize(("total", "count"), [(7, 2), (4, 4), (1, 3), (5, 1)])
def test_prompts_are_dealt_in_equal_shares_and_each_belongs_to_one_process(total: int, count: int) -> None:
    shares = [Processes(rank, count).even_share(total) for rank in range(count)]
    assert len({len(places) for places, _ in shares}) == 1
    assert sorted(itertools.chain.from_iterable(places[:kept] for places, kept in shares)) == list(range(total))
    assert all(place == total - 1 for places, kept in shares for place in places[kept:])


@pytest.mark.fast
def test_more_processes_than_images_are_refused_in_a_line() -> None:
    plan = asked_plan("shapes", "dgpo", "quick", (None, None, None), 1)
    check_split(plan, 32)
    with pytest.raises(UserError, match=r"^--processes 33: dgpo: 33 processes for 4 x 8 images an iteration; start at"):
        check_split(plan, 33)


@pytest.mark.fast
def test_a_folder_goes_on_with_other_processes(tmp_path: Path) -> None:
    one, two = small_plan(tmp_path), small_plan(tmp_path, 2)
    folder = tmp_path / "out"
    claim_folder(one, folder)
    assert claim_folder(two, folder) == two == plan_of(folder)
    assert two.command.endswith(" --processes 2")
    assert "--processes" not in one.command


@pytest.mark.fast
def test_the_same_command_goes_on_with_a_cell_whose_process_died_and_not_with_one_that_failed(tmp_path: Path) -> None:
    plan = small_plan(tmp_path).model_copy(update={"seeds": [0, 1]})
    write_failed(tmp_path, "dgpo", 0, "dgpo, seed 0: its process was ended by SIGKILL", died=True)
    write_failed(tmp_path, "dgpo", 1, "reward shapes: no server is left")
    comparing.forget_failed(plan, tmp_path, only_died=True)
    assert [cell_file(tmp_path, *cell).exists() for cell in plan.cells] == [False, True]
    comparing.forget_failed(plan, tmp_path)
    assert not cell_file(tmp_path, "dgpo", 1).exists()
