"""A comparison's processes: one that dies is one line, and none outlives its comparison."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgpo_bench import compare as comparing
from dgpo_bench import workers
from dgpo_bench.claim import claim_folder
from dgpo_bench.plan import Event, Forecast, Plan
from dgpo_bench.preset import load_preset
from dgpo_bench.records import read_results
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.distributed import processor
from dgpo_plugin.distributed.processor import ISA_VARIABLE
from tests.bench.test_compare import small_preset
from tests.conftest import needs_bf16
from tests.dgpo_plugin.distributed.test_processor import DEAD, FAST, SLOW, TRAPS, Imitate, imitate

__all__ = ["imitate"]  # a fixture

RUN = """
import os, signal
from dgpo_bench.plan import Event

def run_cell(plan, folder, algorithm, seed, listener):
    listen = listener.listen
    listen(Event(f"{algorithm}-seed{seed}", 0.5, "half", evaluated=False))
    folder = folder / "runs" / f"{algorithm}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    print(os.getpid(), file=(folder / "began").open("w"), flush=True)
    %s
    (folder / "done").touch()
"""


def plan(**changes: object) -> Plan:
    preset, task = load_preset("shapes")
    values = {"entries": ["dgpo", "flow-grpo"], "seeds": [0, 1], "jobs": 2, "threads": 1, **changes}
    size = preset.sizes["quick"]
    return Plan(preset_name="shapes", preset=preset, task=task, size_name="quick", size=size, **values)


AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["each-imports", "imported-ahead"])


class Ear:
    """A listener that notes."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def expect(self, forecast: Forecast) -> None:
        raise AssertionError("nothing is forecast here")

    def listen(self, event: Event) -> None:
        self.heard.append(event)


def do_all(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    happens: str,
    failed: Callable[[workers.Job, str], None] | None = None,
    *,
    ahead: bool = False,
    **changes: object,
) -> list[Event]:
    """All runs of a plan, in real processes that do something else than train: a module in the place of ``cell``.

    Args:
        ahead: they are forked from one that has imported what they need.
    """
    stand_in = folder / "stand_in"
    stand_in.mkdir(parents=True)
    (stand_in / "other_cell.py").write_text(RUN % happens)
    (stand_in / "sitecustomize.py").write_text("""
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "dgpo_bench.cell":
            return importlib.util.spec_from_file_location(name, __file__.replace("sitecustomize", "other_cell"))

sys.meta_path.insert(0, Finder())
""")
    monkeypatch.setenv("PYTHONPATH", str(stand_in), prepend=os.pathsep)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    chosen, ear = plan(**changes), Ear()
    jobs = [workers.Job("cell", entry, seed) for entry, seed in chosen.cells]
    with (
        imported_ahead() if ahead else contextlib.nullcontext(),
        workers.start_workers(chosen, folder, min(chosen.jobs, len(jobs))) as started,
    ):
        forked = [type(rank.process).__name__ == "ForkServerProcess" for each in started for rank in each.ranks]
        assert set(forked) == {ahead}
        workers.run_jobs(started, jobs, ear, lambda *_: None, failed)
    return ear.heard


@contextlib.contextmanager
def imported_ahead() -> Iterator[None]:
    """As the command does it, from a process that has this test's environment and ends with it."""
    server: Any = forkserver._forkserver  # noqa: SLF001 - kept as long as Python runs
    server._stop()  # noqa: SLF001
    try:
        with workers.importing_ahead():
            yield
    finally:
        server._stop()  # noqa: SLF001


def done(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("runs/*/done")}


@pytest.mark.slow
@AHEAD
def test_all_runs_are_done_and_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    heard = do_all(tmp_path, monkeypatch, "pass", ahead=ahead)
    names = {"dgpo-seed0", "dgpo-seed1", "flow-grpo-seed0", "flow-grpo-seed1"}
    assert done(tmp_path) == {event.run for event in heard} == names
    pids = [file.read_text() for file in tmp_path.glob("runs/*/began")]
    assert len(set(pids)) == 2  # a worker does several runs: each start costs seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL (the processor refused an instruction"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (most likely the memory ran out"),
        ("os._exit(7)", "ended with exit code 7"),
    ],
)
@AHEAD
def test_a_worker_that_dies_is_one_line(
    happens: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    happens = f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n    if seed == 1: {happens}"
    with pytest.raises(UserError) as refused:
        do_all(tmp_path, monkeypatch, happens, entries=["dgpo"], jobs=1, ahead=ahead)
    line = str(refused.value)
    assert line.startswith("dgpo, seed 1: its process ")
    assert message in line
    assert line.endswith("what is finished is kept, and the same command goes on with the rest")
    assert len(line.splitlines()) == 1
    assert done(tmp_path) == {"dgpo-seed0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "kind", "message"),
    [
        ("from dgpo_plugin.common.errors import UserError; raise UserError('too small')", UserError, "^too small$"),
        ("raise OSError(28, os.strerror(28), '/data/x')", UserError, r"^dgpo, seed 0: /data/x: No space .*; what is"),
        ("import torch; torch.empty(1 << 60, dtype=torch.uint8)", UserError, "dgpo, seed 0: out of memory; give fewer"),
        ("raise KeyError('a bug')", RuntimeError, r"dgpo, seed 0:\nTraceback(.|\n)*KeyError: 'a bug'"),
    ],
)
def test_an_error_in_a_worker_is_that_of_the_comparison(
    happens: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=message):
        do_all(tmp_path, monkeypatch, happens, entries=["dgpo"], seeds=[0], jobs=1)


@pytest.mark.slow
def test_the_others_go_on_where_one_fails_or_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the place of one that died."""
    happens = "if seed == 0: os._exit(7)\n    if seed == 1: raise KeyError('a bug')"
    told: dict[workers.Job, str] = {}
    do_all(tmp_path, monkeypatch, happens, told.__setitem__, entries=["dgpo"], seeds=[0, 1, 2, 3], jobs=1)
    assert done(tmp_path) == {"dgpo-seed2", "dgpo-seed3"}
    assert [job.seed for job in told] == [0, 1]
    died, bug = told.values()
    assert died.startswith("dgpo, seed 0: its process ended with exit code 7")
    assert bug.splitlines()[-1] == "KeyError: 'a bug'"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("number", "processes", "group"),
    [(signal.SIGTERM, 1, False), (signal.SIGTERM, 1, True), (signal.SIGKILL, 1, False), (signal.SIGINT, 2, False)],
    ids=["term", "term-to-all", "kill", "ctrl-c"],
)
@AHEAD
def test_no_worker_outlives_its_comparison(
    number: signal.Signals, processes: int, *, group: bool, tmp_path: Path, ahead: bool
) -> None:
    """Not even one that has nothing to say; and none of its semaphores is left, which would be told of at the end.

    Args:
        group: whether the signal goes to the workers too, as that of a cluster's scheduler does.
    """
    script = tmp_path / "main.py"
    script.write_text("""
if __name__ == "__main__":  # the workers import this file too
    import signal, sys
    from pathlib import Path
    import pytest
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell started in the background
    from tests.bench.test_workers import do_all
    happens = "import time; from tqdm import tqdm; list(tqdm([1], file=open(os.devnull, 'w')))"
    happens += "; (folder / f'{os.getpid()}.pid').touch(); time.sleep(600)"
    processes, ahead = int(sys.argv[2]), sys.argv[3] == "True"
    do_all(Path(sys.argv[1]), pytest.MonkeyPatch(), happens, ahead=ahead, processes=processes, jobs=2 // processes)
""")
    root = Path(__file__).parents[2]
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(processes), str(ahead)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while len(began := list(folder.glob("runs/*/*.pid"))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        pids = [int(file.stem) for file in began]
        assert all(map(alive, pids))
        os.killpg(process.pid, number) if group else process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert "leaked" not in said
        assert "atexit" not in said
        end = time.monotonic() + 60
        while any(map(alive, pids)):
            assert time.monotonic() < end, "a worker is still there"
            time.sleep(0.05)
    finally:
        process.kill()


# ---- one precision for a comparison


@pytest.mark.fast
def test_a_comparison_decides_once(imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told to the workers in the plan, stands in the folder, and is kept by the same command later."""
    told: list[Plan] = []
    monkeypatch.setattr(comparing, "run_missing", lambda plan, *_: told.append(plan))
    nothing = SimpleNamespace(cells=[])
    monkeypatch.setattr(comparing, "gather", lambda plan, folder: nothing)
    monkeypatch.setattr(comparing, "check_task", lambda plan: None)
    asked = plan()
    assert asked.preset.shared["model"]["precision"] == "auto"
    for says, precision, name in ((SLOW, "fp32", "a"), (FAST, "bf16", "b")):
        imitate(says)
        comparing.compare(asked, tmp_path / name, Ear())
        assert {told[-1].run_config(entry, 0).model.precision for entry in asked.entries} == {precision}
    imitate(FAST)
    comparing.compare(asked, tmp_path / "a", Ear())
    assert told[-1] == told[0]
    with pytest.raises(UserError, match="holds seed 1 too"):
        comparing.compare(plan(seeds=[0]), tmp_path / "a", Ear())


@pytest.mark.fast
def test_a_precision_by_name_is_no_decision(imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "bf16_trial", None)  # would be called
    asked = plan()
    shared = {**asked.preset.shared, "model": {**asked.preset.shared["model"], "precision": "fp32"}}
    named = asked.model_copy(update={"preset": asked.preset.model_copy(update={"shared": shared})})
    assert claim_folder(named, tmp_path / "out") == named


TRAPPING = """
import sys
from pathlib import Path
from dgpo_plugin.distributed import processor
processor.TRIAL, processor.cache_folder = Path(sys.argv[1]), lambda: Path(sys.argv[1]).with_name("kept")
if __name__ == "__main__":
    from dgpo_bench import commands
    commands._draw = lambda folder: []
    commands.main(sys.argv[2:])
"""


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize(("says", "precision"), [(TRAPS, "bf16"), (DEAD, "fp32")], ids=["masked", "dead"])
def test_a_comparison_where_bf16_is_refused(says: str, precision: str, tmp_path: Path) -> None:
    """Imitated: a trial dies of SIGILL, and without the mask or even with it; the runs themselves are real."""
    (tmp_path / "trial.py").write_text(says)
    (tmp_path / "main.py").write_text(TRAPPING)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "trial.py"), "compare", small_preset(tmp_path)]
    command += ["--output", str(tmp_path / "out"), "--seeds", "1", "--threads", "1", "--algorithms", "dgpo"]
    clean = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    ended = subprocess.run([*command, "--evaluations", "1500"], env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "model.precision auto" in line]
    assert ("is masked" in line) == (precision == "bf16")
    assert read_results(tmp_path / "out" / "results.json").entries["dgpo"].settings["model"]["precision"] == precision
