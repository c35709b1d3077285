"""What was measured, one JSON line per row; the last line of a row is the one that counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import writing

FILE = "gpu.jsonl"
Status = Literal["measured", "does not fit", "out of memory", "failed", "timed out"]


class Result(BaseModel):
    """The result of one row.

    Attributes:
        row, about: its name and what it is.
        rehearsal: whether it ran on the CPU, with tiny models: the numbers mean nothing.
        anyway: whether it was tried although the plan said that it does not fit.
        reason: why it was not measured.
        seconds: all of its time, with the start of its process.
        measured: the numbers by name; see the functions of :mod:`dgpo_bench.gpu.measures`.
        device: name, memory, torch.
        state: driver, clock (MHz), temperature (C), power (W) at its end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    about: str
    status: Status
    rehearsal: bool
    anyway: bool = False
    reason: str = ""
    seconds: float
    measured: dict[str, Any] = {}
    device: dict[str, Any] = {}
    state: dict[str, Any] = {}
    packages: dict[str, str] = {}
    created: str


def read_results(folder: Path) -> dict[str, Result]:
    """A folder's results by row; none where there is no file.

    Raises:
        UserError: the file is not one of these.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    found: dict[str, Result] = {}
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            result = Result.model_validate_json(line)
        except ValidationError as error:
            if number == len(lines):  # cut off while it was written
                break
            raise UserError(f"{file}, line {number}: not a measured row; choose another --output") from error
        found[result.row] = result
    return found


def append_result(folder: Path, result: Result) -> None:
    """Append a line, which is on the disk when this returns; the rest of one that was cut off goes."""
    with writing(folder / FILE), (folder / FILE).open("ab+") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(result.model_dump()).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
