"""`dgpo-bench throughput`: the numbers hang together; how large they are is the machine's matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_bench.cli import main
from dgpo_bench.throughput import Throughput
from tests.conftest import SMALL


@pytest.mark.slow
def test_throughput(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    changes = [part for change in SMALL for part in ("--set", change)]
    result = CliRunner().invoke(main, ["throughput", "shapes", *changes, "--iterations", "2", "--output", str(file)])
    assert result.exit_code == 0, result.output
    measured = Throughput.model_validate(json.loads(file.read_text()))
    assert measured.iterations == 2
    assert 0.8 < sum(measured.share.values()) <= 1.001
    # 8 images in 4 steps: one evaluation a step and image.
    assert measured.rollout == pytest.approx(measured.images * 4)
    # Two timesteps: the frozen base with guidance (2), the policy forward and backward (3).
    assert measured.training == pytest.approx(measured.samples * 5, rel=0.01)
    assert measured.ceiling_training > 0
    assert measured.peak_memory > 2**27
    assert f"{measured.images:,.1f} images/s" in result.output
