"""Two processes never write one run's folder, nor one comparison's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dgpo_bench.commands import main as bench
from dgpo_plugin.commands.main import main as dgpo
from dgpo_plugin.common.folder_lock import LOCK, only_process
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.run import train
from tests.conftest import SMALL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (dgpo, ["train", "shapes", *(word for value in SMALL for word in ("--set", value)), "--output"]),
        (dgpo, ["resume"]),
        (bench, ["compare", "shapes", "--size", "quick", "--output"]),
    ],
    ids=["train", "resume", "compare"],
)
def test_the_second_is_refused_in_one_line_and_changes_nothing(
    command: object, arguments: list[str], tmp_path: Path, small_config: RunConfig
) -> None:
    folder = tmp_path / "out"
    with only_process(folder):
        (folder / "config.yaml").write_text(f"# of the first\n{small_config.model_dump_json()}\n")
        before = contents(folder)
        ended = CliRunner().invoke(command, [*arguments, str(folder)])  # type: ignore[arg-type]
        assert ended.exit_code == 2
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"error: {folder}: another process is at work there (process {os.getpid()} on ")
        assert contents(folder) == before


@pytest.mark.slow
def test_a_finished_run_leaves_the_folder_free(tmp_path: Path, small_config: RunConfig) -> None:
    train(small_config, tmp_path / "run", Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")) == [LOCK]
    with only_process(tmp_path / "run"):
        pass


@pytest.mark.fast
def test_resume_lays_no_lock_where_there_is_no_run(tmp_path: Path) -> None:
    ended = CliRunner().invoke(dgpo, ["resume", str(tmp_path / "none")])
    assert ended.exit_code == 2
    assert "holds no run" in ended.stderr
    assert not (tmp_path / "none").exists()
