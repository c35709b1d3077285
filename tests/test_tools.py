"""What maintainers run does run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_profile_of_an_iteration() -> None:
    command = [sys.executable, str(ROOT / "tools" / "profile_iteration.py"), "dgpo", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "overhead" in done.stdout
    assert "denoiser forward" in done.stdout


@pytest.mark.slow
def test_both_loops_have_as_many_passes() -> None:
    """It ends with an error if they have not."""
    command = [sys.executable, str(ROOT / "tools" / "beside_released_loop.py"), "--iterations", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if ": rollout " in line]) == 12


@pytest.mark.slow
def test_plan_of_sd35_medium() -> None:
    """The published model has 2.2 to 2.5 billion parameters, and what saves memory makes it fit smaller GPUs."""
    command = [sys.executable, str(ROOT / "tools" / "plan_sd35_medium.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.count(" GiB ") == 2]
    peaks = [float(row.split("GiB")[1]) for row in rows]
    assert len(peaks) == 4
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 24 > 12 > peaks[-1]
    plain, checkpointed = [float(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("kept ")]
    assert plain > 5 * checkpointed > 0


@pytest.mark.slow
def test_the_presets_memory_is_what_was_planned() -> None:
    """`dgpo list models` shows a file; making it again gives the same numbers."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan_presets.py")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    planned = {line.split()[0]: float(line.split()[-2]) for line in done.stdout.splitlines()}
    listed = json.loads((ROOT / "dgpo_plugin" / "presets" / "memory.json").read_text())
    assert planned == {name: row["gib"] for name, row in listed.items()}
