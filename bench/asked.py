"""What a command line asks for, as a plan: a preset, its size, and what is changed of it."""

from __future__ import annotations

from pathlib import Path

from dgpo_plugin.common.errors import UserError

from .devices import gpu_count, runs_at_once
from .gather import TUNING_FILE, read_tuning
from .plan import Plan
from .preset import is_file_name, load_preset, name_of
from .records import write_record


def asked_plan(
    preset: str,
    algorithms: str | None,
    size: str,
    changes: tuple[int | None, int | None, str | None],
    jobs: int | None,
) -> Plan:
    """The plan of a comparison, with the size's seeds, budget and controls changed where others are given."""
    loaded, task = load_preset(preset)
    chosen = loaded.sized(size, *changes)
    names = [name.strip() for name in algorithms.split(",")] if algorithms is not None else list(loaded.algorithms)
    loaded.check_algorithms(names)
    name = name_of(preset)
    plan = Plan.of(name, loaded, task, size, chosen, names, jobs=jobs or 1)  # type: ignore[arg-type]  # sized() knows the size
    for entry in plan.entries:  # a control may not suit the challenger's algorithm
        plan.run_config(entry, 0)
    at_once = min(runs_at_once(jobs, gpu_count()), len(plan.cells))
    return Plan.of(name, loaded, task, size, chosen, names, jobs=at_once)  # type: ignore[arg-type]


def asked_cell(only: str | None) -> tuple[str, int] | None:
    """What ``--only`` names: an entry and a seed."""
    if only is None:
        return None
    entry, separator, seed = only.rpartition(":")
    if only == "base":
        return "base", -1
    if not separator or not seed.isdecimal():
        raise UserError(f"--only {only}: write it as ENTRY:SEED, as in dgpo:0, or base")
    return entry, int(seed)


def take_tuning(preset: str, folder: Path) -> None:
    """Have a comparison show the trials that lie beside its preset's file, unless its folder has its own."""
    beside = Path(preset).parent / TUNING_FILE
    if is_file_name(preset) and beside.is_file() and not (folder / TUNING_FILE).exists():
        write_record(read_tuning(beside), folder / TUNING_FILE)
