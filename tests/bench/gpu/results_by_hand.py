"""Results of rows that nothing measured."""

from __future__ import annotations

from typing import Any

from dgpo_bench.gpu.results import Result


def result(row: str, status: Any, measured: dict[str, Any] | None = None, **more: Any) -> Result:
    values = {"about": "", "rehearsal": False, "seconds": 1.0, "created": "2026-11-26T00:00:00", **more}
    return Result(row=row, status=status, measured=measured or {}, **values)
