"""One case: files in a folder and a command that reads them; run here or as a program, and judged."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from dgpo_bench.commands import main as bench_main
from dgpo_plugin.commands.main import main
from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.training.accept import refuse_misfit
from dgpo_plugin.training.identity import check_same_run, replan
from dgpo_plugin.training.run_folder import RunFolder

MOST_BYTES = 4000
"""Of a line that says what is wrong."""
STOPPED = "stopped; what was finished is kept\n"
"""Said of Ctrl-C; a user's code that raises what Ctrl-C raises is taken for it in a process of one thread."""
MOST_LINES = 4
"""On standard error: the line that counts, and what was said before it, as of skipped files."""


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        kind: in :data:`tests.fuzz.kinds.KINDS`.
        program: ``dgpo`` or ``dgpo-bench``.
        arguments: of the program, which runs in a folder of its own.
        files: what lies there, by relative path.
        expected: what must be so if it is accepted, for the kind's own check.
    """

    kind: str
    program: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes]
    expected: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """As it is kept in a file."""
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return json.dumps({**vars(self), "arguments": list(self.arguments), "files": files}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        files = {name: base64.b64decode(content) for name, content in values["files"].items()}
        return cls(**{**values, "arguments": tuple(values["arguments"]), "files": files})

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, what it printed, and the traceback if there was one."""

    code: int
    output: str
    errors: str
    traceback: str = ""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Have the block run in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_here(case: Case, folder: Path) -> Outcome:
    """Run the command in this process, from the folder."""
    command = {"dgpo": main, "dgpo-bench": bench_main}[case.program]
    if case.arguments[0] == "resume":
        command = read_run
    with inside(folder):
        result = CliRunner().invoke(command, list(case.arguments), prog_name=case.program)
    told = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        told = "".join(traceback.format_exception(result.exception))
    return Outcome(result.exit_code, result.stdout, result.stderr, told)


@click.command()
@click.argument("words", nargs=-1)
@reports_user_errors
def read_run(words: tuple[str, ...]) -> None:
    """What ``dgpo resume`` reads before it loads a model, which would take seconds a case."""
    folder = RunFolder(Path(words[-1]))
    config, checkpoint = folder.read_config(), folder.last_checkpoint()
    assert checkpoint is not None
    replan(config, checkpoint.identity, checkpoint.progress.iteration, config.training.iterations)
    identity = checkpoint.identity.model_copy(update={"config": config.model_dump(mode="json")})
    refuse_misfit(checkpoint.tensors, checkpoint.tensors, checkpoint.path)
    check_same_run(checkpoint.identity, identity, checkpoint.path, checkpoint.progress.iteration)
    folder.prepare(config, checkpoint.progress.iteration)


def run_apart(case: Case, folder: Path) -> Outcome:
    """Run the command as people do, in a process of its own."""
    module = {"dgpo": "dgpo_plugin", "dgpo-bench": "dgpo_bench.commands"}[case.program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", module, *case.arguments], cwd=folder, env=environment, capture_output=True, timeout=600
    )
    errors = done.stderr.decode("utf-8", "replace")
    errors = "\n".join(each for each in errors.split("\n") if "torchao" not in each or each.startswith("error: "))
    return Outcome(
        done.returncode, done.stdout.decode("utf-8", "replace"), errors, errors if "Traceback" in errors else ""
    )


def judged(case: Case, outcome: Outcome) -> str:
    """What is wrong with how a command ended, whatever the kind of its input; empty for nothing."""
    if outcome.traceback:
        return "traceback: " + outcome.traceback
    if outcome.code == 0:
        return ""
    if (
        outcome.code == 130
        and outcome.errors == STOPPED
        and any(b"KeyboardInterrupt" in file for file in case.files.values())
    ):
        return ""
    if outcome.code != 2:
        return f"exit code {outcome.code}: {outcome.errors[-500:]}"
    lines = outcome.errors.rstrip("\n").split("\n")
    last = lines[-1]
    if not last.startswith("error: ") or len(lines) > MOST_LINES:
        return f"not one line: {outcome.errors[:1000]!r}"
    if len(last.encode()) > MOST_BYTES or not last.isprintable():
        return f"too long or not printable: {last[:200]!r}"
    return ""
