"""How the report writes numbers and intervals."""

from __future__ import annotations


def format_number(value: float) -> str:
    """Three decimals below 10, fewer above, two significant digits for what would otherwise read as zero."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


def format_ratio(value: float) -> str:
    """Two significant digits, as few as a ratio of times from a handful of seeds deserves."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def format_bounds(estimate: Estimate) -> str:
    """Where the interval lies, as in ``0.1 to 0.2``; for one seed, that it has none."""
    if estimate.interval is None:
        return "one seed, no interval"
    low, high = estimate.interval
    return f"{format_number(low)} to {format_number(high)}"


def time_unit(largest: float) -> tuple[float, str, int]:
    """(seconds in one unit, its name, decimals worth showing) for times up to ``largest`` seconds."""
    if largest < 300:
        return 1.0, "seconds", 1
    return (60.0, "minutes", 2) if largest < 3 * 3600 else (3600.0, "hours", 3)
