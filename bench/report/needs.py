"""What the next comparison would need, from how much pictures and seeds differed in this one."""

from __future__ import annotations

import numpy as np

from .comparison import Comparison
from .measures import difference, shared_seeds
from .power import power_sentence

DIFFERENCE = 0.03


def needs_sentence(comparison: Comparison) -> str:
    """How many pictures and seeds a difference of .03 in the headline needs; empty where nothing can be compared.

    The deviations are those of the challenger less the first other algorithm with at least two shared seeds.
    """
    results = comparison.results
    for name, entry in results.entries.items():
        seeds = shared_seeds(comparison, results.challenger, name)
        found = difference(comparison, results.challenger, name, "in_domain", results.task.headline)
        if entry.kind == "control" or name == results.challenger or found is None or len(seeds) < 2:
            continue
        ours, theirs = comparison.finished(results.challenger), comparison.finished(name)
        gaps = [
            comparison.scores(ours[seed], set_name, results.task.headline)
            - comparison.scores(theirs[seed], set_name, results.task.headline)
            for seed in seeds
            for set_name in comparison.sets_of("in_domain")
        ]
        pictures = np.concatenate([gap[np.isfinite(gap)] for gap in gaps])
        between = float(np.std(found.points, ddof=1))
        label = f"{comparison.label(results.challenger)} and {comparison.label(name)}"
        sentence = power_sentence(DIFFERENCE, float(pictures.std(ddof=1)), between)
        return f"{sentence} Both are what {label} showed here."
    return ""
