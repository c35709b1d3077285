"""How many pictures and seeds it takes to tell a difference from chance, said before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Needed:
    """What shows a difference in four of five comparisons; ``seeds`` None stands for more than a thousand."""

    pictures: int
    seeds: int | None


def paired_deviation(share: float, correlation: float = 0.0) -> float:
    """Standard deviation of the difference of two yes-or-no verdicts on pictures of one prompt and noise.

    Args:
        share: of pictures that are right, in [0, 1], about the same for both.
        correlation: of both verdicts, in [-1, 1]; 0 is the careful guess before anything was measured.
    """
    return math.sqrt(2 * share * (1 - share) * (1 - correlation))


def needed(difference: float, picture_deviation: float, seed_deviation: float) -> Needed:
    """Pictures and seeds that show a true difference with probability .8, two-sided at 5 %.

    The pictures are for *these adapters, new prompts* (a normal approximation, pictures of a prompt counted as
    independent: as many prompts are the safe reading); the seeds for *a new run* (the noncentral t of paired seed
    means, solved exactly).

    Args:
        difference: > 0, in units of the metric.
        picture_deviation: standard deviation of the paired difference of one picture, >= 0.
        seed_deviation: standard deviation between seeds of their paired mean differences, >= 0.

    Raises:
        ValueError: the difference is not above 0, or a deviation below it.
    """
    if difference <= 0 or picture_deviation < 0 or seed_deviation < 0:
        raise ValueError("the difference must be above 0, and the deviations not below")
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    pictures = max(2, math.ceil((quantiles * picture_deviation / difference) ** 2))
    return Needed(pictures, _seeds(difference, seed_deviation))


def _seeds(difference: float, deviation: float) -> int | None:
    if deviation == 0:
        return 2
    for seeds in range(2, MOST_SEEDS + 1):
        if t_test_power(difference, deviation, seeds) >= POWER:
            return seeds
    return None


def t_test_power(difference: float, deviation: float, seeds: int) -> float:
    """Probability that a paired t-test of so many seeds, two-sided at 5 %, finds a true difference."""
    shift, critical = difference / deviation * math.sqrt(seeds), stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
    upper = float(stats.nct.sf(critical, seeds - 1, shift))
    lower = float(stats.nct.cdf(-critical, seeds - 1, shift))
    return upper + (0.0 if math.isnan(lower) else lower)  # far from 0 scipy's lower tail is NaN: it is 0


def power_sentence(difference: float, picture_deviation: float, seed_deviation: float) -> str:
    """What :func:`needed` found, for a person."""
    found = needed(difference, picture_deviation, seed_deviation)
    seeds = f"more than {MOST_SEEDS}" if found.seeds is None else str(found.seeds)
    return (
        f"To show a difference of {difference:g} in four of five comparisons takes about {found.pictures:,} pictures "
        f"of each, all of other prompts, for these adapters, and {seeds} seeds for the method (if the difference of "
        f"two pictures has a standard deviation of {picture_deviation:.2g}, and that of two runs {seed_deviation:.2g})."
    )
