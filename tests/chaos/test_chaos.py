"""A little of ``make chaos``: the same harms each time, at moments that depend on how busy the machine is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and Linux's ways to adopt orphans and to limit others")
def test_no_run_is_lost() -> None:
    """This seed's first cases have kills, a full disk, a read-only folder and a signal among them."""
    command = [sys.executable, "-m", "tests.chaos", "--what", "runs", "--seed", "358", "--cases", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
