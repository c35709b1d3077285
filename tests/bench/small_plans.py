"""A plan whose numbers can be counted by hand, for what is foretold of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo_bench.plan import Plan
from dgpo_bench.preset import load_preset


def two_seeds_of(entries: Sequence[str], jobs: int, **shared: object) -> Plan:
    """Runs of 1,000 evaluations on shapes, with a control; ``shared`` replaces sections that all entries have."""
    preset, task = load_preset("shapes")
    changes = {
        "evaluations": 1000,
        "flops": None,
        "seeds": 2,
        "schedule": (0.5,),
        "guidances": (1.0, 2.0),
        "controls": ("zero",),
    }
    size = preset.sizes["quick"].model_copy(update=changes)
    preset = preset.model_copy(update={"shared": {**preset.shared, **shared}})
    return Plan.of("shapes", preset, task, "quick", size, list(entries), jobs=jobs)
