"""``dgpo-bench gpu``: its rehearsal, whole; what it keeps when it is cut off."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from dgpo_bench.commands import main
from dgpo_bench.gpu import session
from dgpo_bench.gpu.child import Answer, Task
from dgpo_bench.gpu.results import FILE, Result, read_results
from dgpo_bench.gpu.rows import ROWS, Row, choose_rows
from dgpo_bench.gpu.table import verdict
from tests.bench.gpu.results_by_hand import result

GIB = 2**30


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_rehearsal_runs_every_row(tmp_path: Path) -> None:
    """All of the measuring code, in its processes, with tiny models of the real classes."""
    run = CliRunner().invoke(main, ["gpu", "--rehearsal", "--minutes", "20", "--output", str(tmp_path)])
    assert run.exit_code == 0, run.output
    results = read_results(tmp_path)
    assert list(results) == [row.name for row in ROWS]
    expected = dict.fromkeys(results, "measured") | {"sd35/nf4": "failed"}  # bitsandbytes is not installed
    if shutil.which("g++") is None:  # torch.compile's, on a processor
        expected |= {"sd35/compile": "failed"}
    assert {name: result.status for name, result in results.items()} == expected
    assert "bitsandbytes" in results["sd35/nf4"].reason
    assert results["ranks"].measured["works"]
    assert 0 < results["sd35/numerics"].measured["gradient_relative_difference"] < 1e-4
    for row in ("layouts/one", "layouts/two"):
        assert max(results[row].measured.values()) < 1e-5
    assert results["resumed"].measured["same_bits"]
    assert results["sd35/numerics"].measured["same_bits"]
    assert results["sd35/shard"].measured["relative_difference"] == 0
    assert results["sd35/int8"].measured["applied_difference"] < 1e-3
    assert results["comparison"].measured["runs"] == 3
    dgpo = results["sd35/dgpo"].measured
    assert dgpo["seconds"] >= dgpo["rollout_seconds"] + dgpo["training_seconds"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal" in text
    assert all(f"| {row.name}: " in text for row in ROWS)


@pytest.mark.fast
def test_without_a_gpu_it_offers_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = CliRunner().invoke(main, ["gpu", "--output", str(tmp_path)])
    assert run.exit_code == 2
    assert "no GPU here; --rehearsal" in run.output
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_a_row_that_is_not_there_is_an_error_with_the_near_one(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["gpu", "--rehearsal", "--only", "sd35/dpgo", "--output", str(tmp_path)])
    assert run.exit_code == 2
    assert "sd35/dgpo" in run.output
    assert [row.name for row in choose_rows("sdxl,card")] == ["card", "sdxl/dgpo"]


class FakeChildren:
    """Processes that answer what they are told to, in place of real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []

        def one(child: Any, task: Task, seconds: float, *, tiny: bool) -> Result:
            self.asked.append((task.row.name, task.anyway))
            answer = self.answers[task.row.name].pop(0)
            return result(task.row.name, answer.status, answer.measured, anyway=task.anyway)

        monkeypatch.setattr(session, "measure_row", one)
        monkeypatch.setattr(session, "start_child", lambda **_: None)
        monkeypatch.setattr(session, "end_child", lambda child: None)


def rows(*names: str) -> list[Row]:
    return [Row(name, "iteration", "") for name in names]


@pytest.mark.fast
def test_one_that_does_not_fit_is_tried_all_the_same_and_the_next_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Answer("does not fit", {"planned_bytes": 90 * GIB})
    answers = {"a": [large, Answer("out of memory")], "b": [large], "c": [Answer("measured")]}
    children = FakeChildren(monkeypatch, answers)
    session.measure(rows("a", "b", "c"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    assert children.asked == [("a", False), ("a", True), ("b", False), ("c", False)]
    kept = read_results(tmp_path)
    assert verdict(kept["a"]) == "does not fit, as planned"
    assert verdict(kept["b"]) == "skipped: `dgpo plan` says 90.0 GiB"


@pytest.mark.fast
def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {name: [Answer("measured")] * 3 for name in "abc"}
    children = FakeChildren(monkeypatch, answers)
    session.measure(rows("a", "b"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"row": "c", "about": "cut o')
    session.measure(rows("a", "b", "c"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    assert [name for name, _ in children.asked] == ["a", "b", "c"]
    assert set(read_results(tmp_path)) == {"a", "b", "c"}
    session.measure(rows("b"), tmp_path, 10, lambda line: None, tiny=False, again=True)
    assert [name for name, _ in children.asked][-1] == "b"
    assert session.measure(rows("d"), tmp_path, 0.1, lambda line: None, tiny=False, again=False) == ["d"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be caught there")
def test_a_session_that_is_ended_keeps_what_it_measured_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgpo_bench.commands", "gpu", "--rehearsal", "--output", str(tmp_path)]
    running = subprocess.Popen([*command, "--only", "card,sd35/dgpo,sdxl"], stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("sd35/dgpo"):
            break
    children = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert "card" in read_results(tmp_path)
    assert "want of time" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_a_result(tmp_path: Path) -> None:
    """Real processes: one whose measurement kills it, one that outlasts its time."""
    dying = session.start_child(tiny=True)
    dying.process.kill()
    dying.process.join()
    died = session.measure_row(dying, Task(ROWS[0], tmp_path), 30, tiny=True)
    assert died.status == "failed"
    assert "SIGKILL" in died.reason
    late = session.start_child(tiny=True)
    assert session.measure_row(late, Task(ROWS[0], tmp_path), 0.01, tiny=True).status == "timed out"
    assert not late.process.is_alive()
