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
