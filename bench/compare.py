"""One comparison: every (algorithm, seed) from the same base, on the same prompts, with the same budget.

Each run is a process of its own with its own threads; what it finishes is kept, and a comparison that was stopped
goes on with the runs that are missing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from dgpo_plugin.errors import UserError
from dgpo_plugin.files import write_text_atomically

from .plan import Listener, Plan, run_file
from .report import write_curves, write_report
from .results import Results, Run, write_results
from .workers import run_all


def compare(plan: Plan, folder: Path, listen: Listener) -> Path:
    """Run what is missing and draw the report.

    Returns:
        The report's path.

    Raises:
        UserError: the folder was made by another plan, a budget too small for one iteration, ...
    """
    plan = _claim(plan, folder)
    missing = [(a, s) for s in plan.seeds for a in plan.algorithms if not run_file(folder, a, s).exists()]
    run_all(plan, folder, missing, listen, lambda: collect(plan, folder))
    return collect(plan, folder)


def _claim(plan: Plan, folder: Path) -> Plan:
    """The plan, with what its ``precision: auto`` stands for, written into the folder if that has none."""
    file = folder / "plan.json"
    before: Plan | None = None
    if file.exists():
        try:
            before = Plan.model_validate_json(file.read_text(encoding="utf-8"))
        except (ValidationError, ValueError) as error:
            raise UserError(f"{file}: not a comparison's plan; choose another --output") from error
    plan = _settled(plan, before)
    if before is None:
        write_text_atomically(file, plan.model_dump_json(indent=1) + "\n")
    elif before != plan:
        changed = [name for name in Plan.model_fields if getattr(before, name) != getattr(plan, name)]
        raise UserError(
            f"output {folder}: holds a comparison with another {', '.join(changed)}; "
            f"choose another --output, or remove it to start again"
        )
    return plan


def _settled(plan: Plan, before: Plan | None) -> Plan:
    """With one precision for all runs: that of the comparison to go on with, or what is decided here and now."""
    model = plan.preset.shared.get("model", {})
    if model.get("precision") != "auto":
        return plan
    if before is not None:
        precision = before.preset.shared.get("model", {}).get("precision", "auto")
    else:
        from dgpo_plugin.processes import Processes, best_device
        from dgpo_plugin.trainer import settle_precision

        config = plan.preset.run_config(plan.algorithms[0], plan.seeds[0])
        precision = settle_precision(config, best_device(), Processes(), plan.threads).model.precision
    shared = {**plan.preset.shared, "model": {**model, "precision": precision}}
    return plan.model_copy(update={"preset": plan.preset.model_copy(update={"shared": shared})})


def collect(plan: Plan, folder: Path) -> Path:
    """Gather the finished runs into results.json, curves.csv and report.html."""
    from dgpo_plugin.export import package_versions

    from .evaluate import PRIMARY, metric_definitions

    runs: list[Run] = []
    gallery: dict[str, str] = {}
    prompts: list[str] = []
    tasks: list[str] = []
    for algorithm in plan.algorithms:
        for seed in plan.seeds:
            file = run_file(folder, algorithm, seed)
            if not file.exists():
                continue
            record = json.loads(file.read_text(encoding="utf-8"))
            runs.append(Run.model_validate(record["run"]))
            prompts, tasks = record["gallery_prompts"], record["tasks"]
            where = file.parent.relative_to(folder)
            gallery.setdefault("base", str(where / "base.png"))
            gallery.setdefault(algorithm, str(where / "gallery.png"))
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preset=plan.preset_name,
        git_hash=_git_hash(),
        packages=package_versions(),
        machine=_machine(plan),
        budget=plan.budget,
        seeds=plan.seeds,
        algorithms=plan.algorithms,
        metrics=metric_definitions(tasks),
        primary=PRIMARY,
        settings={
            a: plan.preset.run_config(a, plan.seeds[0]).model_dump(
                mode="json", exclude={"logging": True, "training": {"iterations", "seed"}, "evaluation": True}
            )
            for a in plan.algorithms
        },
        runs=runs,
        gallery=gallery,
        gallery_prompts=prompts,
        complete=len(runs) == len(plan.algorithms) * len(plan.seeds),
    )
    write_results(results, folder / "results.json")
    write_curves(results, folder / "curves.csv")
    return write_report(folder)


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
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "runs at once": str(plan.jobs),
        "threads a run": str(plan.threads),
    }
