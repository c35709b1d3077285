"""Whose folder it is: the plan that a comparison's folder was begun with, and what may be added to it afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError

from .plan import Plan
from .records import read_record, write_record
from .size import BEST_OF_N
from .written import MISSING_FILE

log = logging.getLogger(__name__)
PLAN_FILE, CONTENTS_FILE, ENTRY_CONTENTS = "plan.json", "contents.json", "runs/{}-contents.json"
"""Whose folder it is; and what lies at the places that the plan, or one entry alone, names."""
ELSEWHERE = "choose another --output, or remove it to start again"


class ContentsChanged(UserError):
    """What a comparison or a search was begun with has changed: none of it goes on."""


def plan_of(folder: Path) -> Plan | None:
    """The plan that a folder was made for; None where it has none.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / PLAN_FILE
    return read_record(Plan, file, "not a comparison's plan; choose another --output") if file.exists() else None


@contextlib.contextmanager
def claimed(plan: Plan, folder: Path) -> Iterator[Plan]:
    """Claim a folder for the block; one that ends before anything was measured leaves the folder as it was.

    So what a command was refused for can be mended in the same folder.

    Raises:
        UserError: as :func:`claim_folder`.
    """
    before, measured, said = plan_of(folder), _measured(folder), _said(folder)
    plan = claim_folder(plan, folder)
    try:
        yield plan
    except BaseException:
        if _measured(folder) <= measured:
            for file in _said(folder) - said:
                file.unlink(missing_ok=True)
            if before is not None:
                write_record(before, folder / PLAN_FILE)
        raise


def _measured(folder: Path) -> set[Path]:
    """What says that a base or a cell is measured, or saved on its way."""
    return {file for name in ("base.json", "runs/*/cell.json", "runs/*/progress.json") for file in folder.glob(name)}


def _said(folder: Path) -> set[Path]:
    """What says whose folder it is, and what was found before anything is measured."""
    names = (PLAN_FILE, MISSING_FILE, CONTENTS_FILE, ENTRY_CONTENTS.format("*"))
    return {file for name in names for file in folder.glob(name)}


def claim_folder(plan: Plan, folder: Path) -> Plan:
    """Write the plan, with what its ``precision: auto`` stands for, into a folder that has none or a part of it.

    Further algorithms, controls, adapters and seeds are added to what is there, which is not made again. Another number
    of processes or threads goes on in the same folder, for it changes nothing but the last bits.

    Returns:
        The plan as it is written.

    Raises:
        UserError: the folder was made by another plan, by one that had more, or holds something else.
    """
    before = plan_of(folder)
    plan = with_precision(plan, before)
    if before == plan:
        return plan
    if before is not None:
        if changed := _changed(before, plan):
            raise UserError(f"output {folder}: holds a comparison with another {', '.join(changed)}; {ELSEWHERE}")
        for entry in plan.adapters:
            if _is_other(entry, before, plan):
                raise UserError(
                    f"output {folder}: its {entry} was another file than {plan.adapters[entry]}; {ELSEWHERE}"
                )
        if more := _left_out(before, plan):
            raise UserError(f"output {folder}: holds {', '.join(more)} too; name them as well, or {ELSEWHERE}")
        if before.processes != plan.processes:
            log.warning(
                "%s was begun with %s, and goes on with %s: what is measured is the same but for rounding",
                *(folder, _counted(before.processes), _counted(plan.processes)),
            )
    write_record(plan, folder / PLAN_FILE)
    return plan


def with_precision(plan: Plan, before: Plan | None) -> Plan:
    """The plan with one precision for all cells: that of the comparison to go on with, or one that is decided now."""
    model = plan.preset.shared.get("model", {})
    if model.get("precision") != "auto":
        return plan
    if before is not None:
        precision = before.preset.shared.get("model", {}).get("precision", "auto")
    else:
        from dgpo_plugin.distributed.device import best_device
        from dgpo_plugin.distributed.processes import Processes
        from dgpo_plugin.training.build import settle_precision

        config = plan.base_config()
        precision = settle_precision(config, best_device(), Processes(), plan.threads).model.precision
    shared = {**plan.preset.shared, "model": {**model, "precision": precision}}
    return plan.model_copy(update={"preset": plan.preset.model_copy(update={"shared": shared})})


def _changed(before: Plan, plan: Plan) -> list[str]:
    """What is not as it was for that which may be measured already."""
    how_it_runs = {"jobs", "processes", "threads"}
    grows = {"entries", "adapters", "adapter_sha256", "best_of_n", "seeds", "size", "preset"}
    same = Plan.model_fields.keys() - how_it_runs - grows
    found = [name for name in Plan.model_fields if name in same and getattr(before, name) != getattr(plan, name)]
    found += ["size"] if _asked_of_each(before) != _asked_of_each(plan) else []
    trained = [entry for entry in before.entries if entry in plan.entries and not plan.adapters]
    settings = [_settings(each, trained, before.seeds[0]) for each in (before, plan)]
    found += ["preset"] if settings[0] != settings[1] else []
    return found


def _is_other(adapter: str, before: Plan, plan: Plan) -> bool:
    """Whether an adapter of two plans is another file; a plan of before they were written has no hashes."""
    files = [each.adapters.get(adapter) for each in (before, plan)]
    hashes = [each.adapter_sha256.get(adapter) for each in (before, plan)]
    return None not in files and (files[0] != files[1] or (None not in hashes and hashes[0] != hashes[1]))


def _asked_of_each(plan: Plan) -> dict[str, Any]:
    """What a size asks of every single cell."""
    return plan.size.model_dump(exclude={"seeds", "controls"})


def _settings(plan: Plan, entries: Sequence[str], seed: int) -> list[Any]:
    """The curves' guidance of a plan, its base, and how it trains these entries."""
    return [plan.guidance, plan.base_config().model, *(plan.run_config(entry, seed) for entry in entries)]


def _left_out(before: Plan, plan: Plan) -> list[str]:
    """What a folder was begun with and a plan does not have."""
    entries = [entry for entry in before.entries if entry not in plan.entries]
    entries += [BEST_OF_N] if before.best_of_n and not plan.best_of_n else []
    return entries + [f"seed {seed}" for seed in before.seeds if seed not in plan.seeds]


def _counted(processes: int) -> str:
    """A number of processes of a run, for people."""
    return f"{processes} process{'' if processes == 1 else 'es'} a run"
