"""Two real processes, one of whose pictures cannot be scored: both go on, and both stop where it is too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dgpo_plugin.distributed.test_processes import arguments, finish, launch, program_with_reward

NOT_ON_THE_SECOND = """
    values = images.mean((1, 2, 3))
    if rank == 1:
        values[0] = float("nan")
    return values
"""


@pytest.mark.slow
def test_processes_agree_on_what_is_left_out(tmp_path: Path) -> None:
    """Each iteration's fifteen pictures but one of the second process's; then a share that this is too much for."""
    script = program_with_reward(tmp_path / "broken.py", NOT_ON_THE_SECOND)
    skip = ["scoring.on_failure=skip", "training.iterations=2", "evaluation.images=8"]
    said = finish(launch(2, *arguments(tmp_path / "run", *skip), extra=str(script)))
    assert "(7 of 8 pictures) -> " in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == pytest.approx([1 / 15] * 2)
    kept = sorted(path.name for path in (tmp_path / "run" / "failed-reward").iterdir())
    assert kept == ["process-1-0000.png", "process-1-prompts.jsonl"]

    process = launch(2, *arguments(tmp_path / "strict", *skip, "scoring.max_skipped=0.05"), extra=str(script))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "process 1: iteration 1: 1 of 15 pictures could not be scored (reward shapes 1)" in output
    assert "failed-reward/process-1-*" in output
    assert "another process is gone" not in output
