"""How the report writes numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .intervals import LEAST_SEEDS, Estimate, Interval

TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def format_number(value: float, signed: bool = False) -> str:
    """Three decimals below 10, fewer above, two significant digits for what would otherwise read as zero."""
    size = abs(value)
    if size < 5e-5:
        return "0"
    text = f"{value:.2g}" if size < 0.01 else f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return f"+{text}" if signed and value > 0 else text


def format_ratio(value: float) -> str:
    """Two significant digits, as few as a ratio of times from a handful of seeds deserves."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def format_interval(interval: Interval | None, signed: bool = False) -> str:
    """Where an interval lies, as in ``0.1 to 0.2``; empty for none."""
    if interval is None:
        return ""
    return f"{format_number(interval.low, signed)} to {format_number(interval.high, signed)}"


def format_bounds(estimate: Estimate, signed: bool = False) -> str:
    """Both intervals of an estimate, each with its name, and why one is not there."""
    prompts, runs = format_interval(estimate.prompts, signed), format_interval(estimate.runs, signed)
    first = f"new prompts {prompts}" if prompts else "too few prompts for an interval"
    few = f"{count(len(estimate.points), 'seed')}, a new run needs {LEAST_SEEDS}"
    return f"{first}; {f'a new run {runs}' if runs else few}"


def format_between(low: float, high: float) -> str:
    """A ratio that lies between two bounds; 0 and infinity are none."""
    if math.isinf(high):
        return f"at least {format_ratio(low)}{TIMES}"
    if low == 0:
        return f"at most {format_ratio(high)}{TIMES}"
    return f"{format_ratio(low)}{TIMES} to {format_ratio(high)}{TIMES}"


def format_amount(value: float) -> str:
    """A count with a letter for its size, as in ``62k``; three significant digits."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def format_guidances(guidances: Iterable[float]) -> str:
    """The guidances that seeds chose, each once, rising."""
    return ", ".join(f"{guidance:g}" for guidance in sorted(set(guidances)))


def time_unit(largest: float) -> tuple[float, str, int]:
    """(seconds in one unit, its name, decimals worth showing) for times up to ``largest`` seconds."""
    if largest < 300:
        return 1.0, "seconds", 1
    return (60.0, "minutes", 2) if largest < 3 * 3600 else (3600.0, "hours", 3)


def count(number: int, thing: str) -> str:
    """So many of a thing, with its plural."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
