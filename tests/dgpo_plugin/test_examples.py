"""What the pages tell people to run does run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_profile_of_an_iteration() -> None:
    command = [sys.executable, str(ROOT / "examples" / "profile_iteration.py"), "dgpo", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "overhead" in done.stdout
    assert "denoiser forward" in done.stdout


@pytest.mark.slow
def test_plan_of_sd35_medium() -> None:
    """The published model has 2.2 to 2.5 billion parameters, and what saves memory makes it fit smaller GPUs."""
    command = [sys.executable, str(ROOT / "examples" / "plan_sd35_medium.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.count(" GiB ") == 2]
    peaks = [float(row.split("GiB")[1]) for row in rows]
    assert len(peaks) == 4
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 24 > 12 > peaks[-1]
