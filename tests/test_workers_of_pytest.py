"""What lets several workers of pytest share the tests: groups, and locks round what they would make at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from tests.locks import CACHE, locked

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]


def test_a_file_is_a_group(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("xdist_group")
    assert marker.args == ("test_workers_of_pytest.py",)


def test_a_lock_holds_other_processes_off() -> None:
    script = f"from tests.locks import locked; locked({Path(__file__).stem!r}).acquire(timeout=0)"
    command = [sys.executable, "-c", script]
    with locked(Path(__file__).stem):
        inside = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert Timeout.__name__ in inside.stderr
    outside = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outside.returncode == 0, outside.stderr
    (CACHE / f"{Path(__file__).stem}.lock").unlink(missing_ok=True)


@pytest.mark.parametrize("folder", ["comfy_nodes", "parity"])
def test_a_folder_that_shares_one_thing_is_one_group(folder: str) -> None:
    """Asked of pytest itself, because marks are given while tests are collected."""
    code = f"""
import sys, pytest

class Groups:
    def pytest_collection_finish(self, session):
        groups = {{item.get_closest_marker("xdist_group").args[0] for item in session.items}}
        print("GROUPS", sorted(groups), file=sys.__stdout__)

pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/{folder}", "tests/test_wheel.py"], [Groups()])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"GROUPS ['{folder}', 'test_wheel.py']" in done.stdout, done.stdout + done.stderr


def test_groups_that_take_minutes_come_first() -> None:
    """As workers take them; in xdist's own, by the number of tests, the longest come last."""
    code = """
import pytest

class Order:
    def pytest_collection_finish(self, session):
        print("ORDER", list(dict.fromkeys(item.path.name for item in session.items)))

pytest.main(["--collect-only", "-q", "-s", "-p", "no:cacheprovider", "tests/dgpo_plugin/common/test_files.py",
             "tests/bench/test_workers.py", "tests/parity/test_parity.py"], [Order()])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ORDER ['test_parity.py', 'test_workers.py', 'test_files.py']" in done.stdout, done.stdout + done.stderr
    assert "--no-loadscope-reorder" in (ROOT / "Makefile").read_text()
