"""The process that a row is measured in: a fault on the card, or too much memory, ends it and nothing else."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError, in_one_line

from .results import Status
from .rows import Row


@dataclass(frozen=True)
class Task:
    """What a process is to measure.

    Attributes:
        folder: where the row may keep what it goes on from.
        anyway: whether to measure even what the plan says does not fit.
    """

    row: Row
    folder: Path
    anyway: bool = False


@dataclass(frozen=True)
class Answer:
    """What a process sends back; its fields are those of :class:`dgpo_bench.gpu.results.Result`."""

    status: Status
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
        answer = _measure(task, tiny=tiny)
    except UserError as error:
        answer = Answer("failed", reason=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            answer = Answer("out of memory", reason=str(error).splitlines()[0])
        else:
            traceback.print_exc()
            answer = Answer("failed", reason=in_one_line(error))
    pipe.send(answer)


def _measure(task: Task, *, tiny: bool) -> Answer:
    """Measure a row, unless the plan says that it does not fit."""
    from . import measures, other_measures
    from .card import describe_device, device_state
    from .setting import fits, setting

    row = task.row
    without_model: dict[str, Callable[[], dict[str, Any]]] = {
        "card": lambda: measures.card(tiny=tiny),
        "layouts": lambda: measures.layouts(row, tiny=tiny),
        "resumed": lambda: other_measures.resumed(tiny=tiny),
        "ranks": lambda: other_measures.ranks(tiny=tiny),
        "comparison": lambda: other_measures.comparison(row, task.folder / "comparison", tiny=tiny),
    }
    with_model = {
        "iteration": measures.iteration,
        "rates": measures.rates,
        "profile": measures.profile,
        "numerics": measures.numerics,
        "attention": measures.attention,
        "adapter": other_measures.adapter,
        "shard": other_measures.shard_denoiser,
        "load": other_measures.load,
    }
    if row.kind in without_model:
        answer = Answer("measured", without_model[row.kind]())
    else:
        with setting(row, tiny=tiny) as settled:
            if row.kind == "iteration" and not task.anyway and not fits(plan := settled.plan()):
                answer = Answer("does not fit", {"planned_bytes": plan.peak}, "planned to take more")
            else:
                answer = Answer("measured", with_model[row.kind](settled))
    return replace(answer, device=describe_device(), state=device_state())
