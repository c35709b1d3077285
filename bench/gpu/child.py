"""The process that a row is measured in: a fault on the card, or too much memory, ends it and nothing else."""

from __future__ import annotations

import os
import signal
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError, in_one_line

from .rows import Row


@dataclass(frozen=True)
class Task:
    """What a process is told.

    Attributes:
        folder: where the row may keep what it goes on from.
        anyway: measure even what the plan says does not fit.
    """

    row: Row
    folder: Path
    anyway: bool = False


@dataclass(frozen=True)
class Answer:
    """What it says.

    Attributes:
        status: as of :class:`dgpo_bench.gpu.results.Result`.
    """

    status: str
    measured: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    device: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def serve(pipe: Any, *, tiny: bool) -> None:
    """Import what measuring needs, then wait for one task, do it and say how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent ends this one
    if tiny:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from dgpo_plugin.commands.terminal import is_out_of_memory, quieten

    quieten()
    import torch

    from . import measures  # noqa: F401  (the seconds that it takes go by while another row is measured)

    try:
        task: Task = pipe.recv()
    except EOFError:  # nothing is left to do
        return
    if tiny and task.row.kind != "rates":
        # Kernels for a processor take a minute to make; one row rehearses that.
        torch.compiler.set_stance("force_eager")
    try:
        answer = _measured(task, tiny=tiny)
    except UserError as error:
        answer = Answer("failed", reason=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            answer = Answer("out of memory", reason=str(error).splitlines()[0])
        else:
            traceback.print_exc()
            answer = Answer("failed", reason=in_one_line(error))
    pipe.send(answer)


def _measured(task: Task, *, tiny: bool) -> Answer:
    from . import measures, other_measures
    from .card import describe, state
    from .setting import fits, setting

    row = task.row
    alone = {"card": measures.card, "ranks": other_measures.ranks}
    if row.kind in alone:
        return Answer("measured", alone[row.kind](tiny=tiny), "", describe(), state())
    if row.kind == "comparison":
        return Answer(
            "measured", other_measures.comparison(row, task.folder / "comparison", tiny=tiny), "", describe(), state()
        )
    kinds = {
        "iteration": measures.iteration,
        "rates": measures.rates,
        "profile": measures.profile,
        "numerics": measures.numerics,
        "attention": measures.attention,
        "adapter": other_measures.adapter,
        "shard": other_measures.split,
        "load": other_measures.load,
    }
    with setting(row, tiny=tiny) as settled:
        if row.kind == "iteration" and not task.anyway:
            plan = settled.plan()
            if not fits(plan):
                return Answer("does not fit", {"planned_bytes": plan.peak}, "planned to take more", describe(), state())
        found = kinds[row.kind](settled)
    return Answer("measured", found, "", describe(), state())
