"""One cell a job: what a cluster runs, and in which order."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_bench import compare as comparing
from dgpo_bench.commands import main
from dgpo_bench.plan import Plan, cell_file
from dgpo_bench.preset import load_preset
from dgpo_bench.written import read_cell
from dgpo_plugin.common.errors import UserError
from tests.bench.test_cell import Ear

pytestmark = pytest.mark.fast

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm_array.sh"


def plan() -> Plan:
    preset, task = load_preset("shapes")
    fixed = {**preset.shared, "model": {**preset.shared["model"], "precision": "fp32"}}
    preset = preset.model_copy(update={"shared": fixed})
    return Plan.of("shapes", preset, task, "quick", preset.sizes["quick"], ["dgpo", "flow-grpo"], jobs=1)


def test_a_cell_that_is_not_there_and_one_that_comes_too_early_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only dpgo:0: no such cell; entries are dgpo, flow-grpo"):
        comparing.run_only(plan(), tmp_path, "dpgo", 0, Ear())
    with pytest.raises(UserError, match="--only dgpo:0: the base comes first; run the same command with --only base"):
        comparing.run_only(plan(), tmp_path, "dgpo", 0, Ear())


def test_a_cell_runs_once_and_its_failure_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.json").write_text("{}")
    ran: list[tuple[str, int]] = []

    def run_cell(_plan: Plan, _folder: Path, entry: str, seed: int, _listener: object) -> None:
        ran.append((entry, seed))
        raise UserError("reward shapes: no server is left")

    monkeypatch.setattr("dgpo_bench.cell.run_cell", run_cell)
    with pytest.raises(UserError, match="no server is left"):
        comparing.run_only(plan(), tmp_path, "dgpo", 0, Ear())
    record = read_cell(cell_file(tmp_path, "dgpo", 0))
    assert (record.status, record.reason) == ("failed", "reward shapes: no server is left")
    comparing.run_only(plan(), tmp_path, "dgpo", 0, Ear())
    assert ran == [("dgpo", 0)]
    comparing.forget_failed(plan(), tmp_path)
    with pytest.raises(UserError):
        comparing.run_only(plan(), tmp_path, "dgpo", 0, Ear())
    assert len(ran) == 2


def test_the_slurm_example_submits_the_base_the_cells_and_the_report(tmp_path: Path) -> None:
    """With stand-ins for sbatch and dgpo-bench that note how they are called."""
    stand_ins = {
        "sbatch": f'printf "%s\\n" "$*" >> {tmp_path}/submitted\n[ "$1" = --parsable ] && echo 7 || true',
        "dgpo-bench": '[ "$1" = plan ] && echo dgpo:0 flow-grpo:0 dgpo:1 flow-grpo:1 dgpo:2 flow-grpo:2 || echo "$*"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    place = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", str(EXAMPLE), "shapes", "out", "full", "4"], env=place, check=True)
    base, cells, report = (tmp_path / "submitted").read_text().splitlines()
    assert base.endswith("dgpo-bench compare shapes --size full --processes 4 --output out --only base")
    assert all("--nodes=1 --gpus-per-node=4 " in job for job in (base, cells))
    assert "--dependency=afterok:7 --array=0-5" in cells
    assert report == "--dependency=afterany:7 --wrap dgpo-bench report out"
    wrapped = cells.partition("--wrap ")[2]
    told = subprocess.run(
        ["bash", "-c", wrapped], env={**place, "SLURM_ARRAY_TASK_ID": "4"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "compare shapes --size full --processes 4 --output out --only dgpo:2"


def test_the_cells_of_the_example_are_those_of_the_size() -> None:
    result = CliRunner().invoke(main, ["plan", "shapes", "--size", "full", "--controls", "zero", "--cells"])
    assert result.exit_code == 0, result.output
    entries = ("dgpo", "flow-grpo", "flow-grpo-fast", "zero")
    assert result.output.split() == [f"{entry}:{seed}" for seed in range(5) for entry in entries]
