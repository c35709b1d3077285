"""One comparison: every (algorithm, seed) from the same base, on the same prompts, with the same budget.

Each run is a process of its own with its own threads; what it finishes is kept, and a comparison that was stopped
goes on with the runs that are missing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.folder_lock import only_process

from .devices import gpu_names
from .plan import Listener, Plan, base_file, run_file
from .report.page import write_report
from .results import Budget, Results, Run, read_base, read_run, write_results
from .workers import Task, run_tasks, start_workers


def compare(plan: Plan, folder: Path, listener: Listener) -> Path:
    """Run what is missing and draw the report.

    Returns:
        The report's path.

    Raises:
        UserError: the folder was made by another plan, a budget too small for one iteration, ...
    """
    with only_process(folder) as held:
        plan = claim_folder(plan, folder)
        missing = [(algorithm, seed) for algorithm, seed in plan.runs if not run_file(folder, algorithm, seed).exists()]
        if missing:
            run_missing(plan, folder, missing, listener)
        held.check()
        return collect(plan, folder)


def run_missing(plan: Plan, folder: Path, missing: list[tuple[str, int]], listener: Listener) -> None:
    """Measure the base and time each algorithm, say what the runs will take, and do them.

    Raises:
        UserError: a task that was refused, or whose process died.
    """
    from .forecast import forecast

    first = [] if base_file(folder).exists() else [Task("base")]
    first += [Task("timing", algorithm) for algorithm in plan.algorithms if algorithm in dict(missing)]
    with start_workers(plan, folder, min(plan.jobs, max(len(missing), len(first)))) as workers:
        measured = run_tasks(workers, first, listener, lambda: None)
        timings = {task.algorithm: timing for task, timing in measured.items() if task.kind == "timing"}
        listener.expect(forecast(plan, missing, timings))
        runs = [Task("run", algorithm, seed) for algorithm, seed in missing]
        run_tasks(workers, runs, listener, lambda: collect(plan, folder))


def claim_folder(plan: Plan, folder: Path) -> Plan:
    """Write the plan, with what its ``precision: auto`` stands for, into the folder if that has none, and return it.

    Raises:
        UserError: the folder was made by another plan, or holds something else.
    """
    file = folder / "plan.json"
    before: Plan | None = None
    if file.exists():
        try:
            before = Plan.model_validate_json(file.read_text(encoding="utf-8"))
        except (ValidationError, ValueError) as error:
            raise UserError(f"{file}: not a comparison's plan; choose another --output") from error
    plan = _with_precision(plan, before)
    if before is None:
        write_text_atomically(file, plan.model_dump_json(indent=1) + "\n")
    elif before != plan:
        changed = [name for name in Plan.model_fields if getattr(before, name) != getattr(plan, name)]
        raise UserError(
            f"output {folder}: holds a comparison with another {', '.join(changed)}; "
            f"choose another --output, or remove it to start again"
        )
    return plan


def _with_precision(plan: Plan, before: Plan | None) -> Plan:
    """The plan with one precision for all runs: that of the comparison to go on with, or one that is decided now."""
    model = plan.preset.shared.get("model", {})
    if model.get("precision") != "auto":
        return plan
    if before is not None:
        precision = before.preset.shared.get("model", {}).get("precision", "auto")
    else:
        from dgpo_plugin.distributed.device import best_device
        from dgpo_plugin.distributed.processes import Processes
        from dgpo_plugin.training.build import settle_precision

        config = plan.preset.run_config(plan.algorithms[0], plan.seeds[0])
        precision = settle_precision(config, best_device(), Processes(), plan.threads).model.precision
    shared = {**plan.preset.shared, "model": {**model, "precision": precision}}
    return plan.model_copy(update={"preset": plan.preset.model_copy(update={"shared": shared})})


def collect(plan: Plan, folder: Path) -> Path:
    """Gather the finished runs into results.json, curves.csv and report.html.

    Returns:
        The report's path.

    Raises:
        UserError: the base or a finished run cannot be read.
    """
    from dgpo_plugin.common.provenance import package_versions

    from .metrics import PRIMARY, metric_definitions

    base = read_base(base_file(folder))
    gallery = {"base": base_file(folder).with_suffix(".png").name}
    runs: list[Run] = []
    for algorithm in plan.algorithms:
        for seed in plan.seeds:
            file = run_file(folder, algorithm, seed)
            if file.exists():
                runs.append(read_run(file))
                gallery.setdefault(algorithm, (file.parent.relative_to(folder) / "gallery.png").as_posix())
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preset=plan.preset_name,
        git_hash=_git_hash(),
        packages=package_versions(),
        machine=_machine(plan),
        budget=Budget(size=plan.size_name, evaluations=plan.size.evaluations, caution=plan.size.caution),
        seeds=plan.seeds,
        algorithms=plan.algorithms,
        challenger=plan.preset.challenger,
        labels=plan.preset.labels,
        colors=plan.preset.colors,
        metrics=metric_definitions(base.tasks),
        primary=PRIMARY,
        settings={algorithm: _settings(plan, algorithm) for algorithm in plan.algorithms},
        base=base.guided,
        runs=runs,
        gallery=gallery,
        gallery_prompts=base.gallery_prompts,
        complete=len(runs) == len(plan.algorithms) * len(plan.seeds),
    )
    write_results(results, folder / "results.json")
    return write_report(folder)


def _settings(plan: Plan, algorithm: str) -> dict[str, Any]:
    """An algorithm's configuration, without what the comparison decides in its place."""
    replaced: Any = {"logging": True, "training": {"iterations", "seed"}, "evaluation": True}
    return plan.preset.run_config(algorithm, plan.seeds[0]).model_dump(mode="json", exclude=replaced)


def _git_hash() -> str | None:
    """The checkout's commit, with ``+`` where it has changes; None where the package is not in a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def _machine(plan: Plan) -> dict[str, str]:
    """The computer, and how much of it each run had."""
    from dgpo_plugin.distributed.device import processor_name

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": processor_name(),
        "cores": str(os.cpu_count()),
        **({"GPUs": ", ".join(gpus)} if (gpus := gpu_names()) else {}),
        "runs at once": str(plan.jobs),
        "threads per run": str(plan.threads),
    }
