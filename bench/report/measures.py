"""Means, differences and curves of a comparison, always over the same prompts and noises on both sides."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..records import BASE, NO_SEED, CellRecord
from .comparison import Comparison, Place, Role
from .intervals import Array, Estimate, estimate


@functools.lru_cache(maxsize=512)
def value(comparison: Comparison, entry: str, role: Role, metric: str, tag: str | None = None) -> Estimate | None:
    """A finished entry at its own guidance; None where nothing was measured.

    Args:
        tag: of the prompts that count; None for those of the headline.
    """
    return value_at(comparison, list(comparison.finished(entry).values()), role, metric, tag)


def value_at(
    comparison: Comparison, places: Sequence[Place], role: Role, metric: str, tag: str | None = None
) -> Estimate | None:
    """The mean of what was sampled at some places, one a seed; a place where nothing was measured is left out."""
    return _estimate(comparison, [(place, None) for place in places], role, metric, tag)


@functools.lru_cache(maxsize=512)
def difference(
    comparison: Comparison, first: str, second: str, role: Role, metric: str, tag: str | None = None
) -> Estimate | None:
    """One finished entry less another (or the base), each at its own guidance, by seed, prompt and noise.

    Returns:
        None where they share no seed, or no picture of the same prompt and noise.
    """
    ours, theirs = comparison.finished(first), comparison.finished(second)
    if second == BASE:
        pairs = [(place, theirs[NO_SEED]) for place in ours.values()]
    else:
        pairs = [(place, theirs[seed]) for seed, place in ours.items() if seed in theirs]
    return _estimate(comparison, pairs, role, metric, tag)


def gain_at(
    comparison: Comparison, places: Sequence[Place], role: Role, metric: str, tag: str | None = None
) -> Estimate | None:
    """What was sampled at some places, one a seed, less the untrained base at its best guidance."""
    return gain_over_base(comparison, places, comparison.finished(BASE)[NO_SEED][3], role, metric, tag)


def gain_over_base(
    comparison: Comparison,
    places: Sequence[Place],
    guidance: float,
    role: Role,
    metric: str,
    tag: str | None = None,
) -> Estimate | None:
    """As :func:`gain_at`, with the base at any guidance."""
    base = (BASE, NO_SEED, 0, guidance)
    return _estimate(comparison, [(place, base) for place in places], role, metric, tag)


def shared_seeds(comparison: Comparison, first: str, second: str) -> list[int]:
    """The seeds that two entries have both finished."""
    theirs = comparison.finished(second)
    return [seed for seed in comparison.finished(first) if seed in theirs]


def curve_values(
    comparison: Comparison, cell: CellRecord, role: Role, metric: str, tag: str | None = None
) -> tuple[list[int], Array]:
    """What a cell measured at its checkpoints, at the curves' guidance: checkpoints (E,) and means (E,).

    All points are means over the same pictures, those that every checkpoint of every cell has, so that neither another
    checkpoint nor another cell means other prompts.
    """
    means = [
        on_curve(comparison, comparison.at_checkpoint(cell, index), role, metric, tag)
        for index in range(len(cell.checkpoints))
    ]
    indices = [index for index, mean in enumerate(means) if mean is not None]
    return indices, np.array([means[index] for index in indices], dtype=np.float64)


def on_curve(comparison: Comparison, place: Place, role: Role, metric: str, tag: str | None = None) -> float | None:
    """The mean over the pictures that curves are made of, of what was sampled at a place; None if one lacks."""
    found = []
    for name in comparison.sets_of(role):
        mask = _curve_mask(comparison, name, metric)
        if mask is not None:
            chosen = mask & _chosen(comparison, name, tag)[:, None]
            prompts = chosen.any(axis=1)
            sums = np.where(chosen, comparison.scores(place, name, metric), 0.0).sum(axis=1)
            found.append(sums[prompts] / chosen.sum(axis=1)[prompts])
    joined = np.concatenate(found) if found else np.empty(0)
    return float(joined.mean()) if len(joined) and np.isfinite(joined).all() else None


@functools.lru_cache(maxsize=256)
def _curve_mask(comparison: Comparison, set_name: str, metric: str) -> NDArray[np.bool_] | None:
    """Pictures of a set, (P, I), that every measured checkpoint of every cell has; None where there are none."""
    cells = [cell for cell in comparison.results.cells if cell.status == "done"]
    places = {comparison.at_checkpoint(cell, i) for cell in cells for i in range(len(cell.checkpoints))}
    finite = [np.isfinite(comparison.scores(place, set_name, metric)) for place in sorted(places)]
    measured = [mask for mask in finite if mask.any()]
    if not measured:
        return None
    mask: NDArray[np.bool_] = np.logical_and.reduce(measured)
    return mask if mask.any() else None


def _chosen(comparison: Comparison, set_name: str, tag: str | None) -> NDArray[np.bool_]:
    if tag is None:
        return comparison.counted(set_name)
    return np.array([prompt.tag == tag for prompt in comparison.results.sets[set_name].prompts], dtype=np.bool_)


def _estimate(
    comparison: Comparison, pairs: Sequence[tuple[Place, Place | None]], role: Role, metric: str, tag: str | None
) -> Estimate | None:
    """Mean over prompts of first less second (or of first alone), over the prompts that every seed has."""
    rows, tags = [], list[str]()
    for name in comparison.sets_of(role):
        chosen = _chosen(comparison, name, tag)
        tags += [f"{name} {p.tag}" for p, of in zip(comparison.results.sets[name].prompts, chosen, strict=True) if of]
        scores = []
        for first, second in pairs:
            found = comparison.scores(first, name, metric)
            if second is not None:
                found = found - comparison.scores(second, name, metric)
            scores.append(prompt_means(found[chosen]))
        rows.append(np.array(scores).reshape(len(pairs), int(chosen.sum())))
    values = np.concatenate(rows, axis=1) if rows else np.empty((len(pairs), 0))
    values = values[np.isfinite(values).any(axis=1)]
    everywhere: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values), axis=0)
    if not len(values) or not everywhere.any():
        return None
    return estimate(values[:, everywhere], [tag for tag, kept in zip(tags, everywhere, strict=True) if kept])


def prompt_means(scores: Array) -> Array:
    """The mean over the pictures of each prompt, (P,), of those that were measured; NaN where none was."""
    counts = np.isfinite(scores).sum(axis=1)
    sums: Array = np.where(np.isfinite(scores), scores, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def expected_best(scores: Array, count: int, sign: float) -> Array:
    """The expected best of ``count`` of a prompt's pictures, drawn without replacement, for each prompt.

    The k-th of n in rising order is the best of a draw with probability C(k-1, count-1) / C(n, count), which averages
    over all draws exactly (the estimator that pass@k has in Chen et al. 2021, arXiv 2107.03374).

    Args:
        scores: (P, I), all finite.
        count: in [1, I].
        sign: 1 where more is better, -1 where less is.

    Returns:
        (P,).
    """
    n = scores.shape[1]
    weights = np.zeros(n)
    weight = 1.0  # C(k-1, count-1) / C(n, count) from the top: count/n, then times (k-count)/(k-1) downwards
    for k in range(n, count - 1, -1):
        weights[k - 1] = weight = count / n if k == n else weight * (k + 1 - count) / k
    best: Array = np.sort(sign * scores, axis=1) @ weights * sign
    return best


def best_of(comparison: Comparison, entry: str, count: int) -> float | None:
    """The headline in domain if of ``count`` pictures the best were kept, mean over prompts and seeds.

    The choice is by the headline itself, so this is the most that choosing can give. None where a prompt has fewer
    pictures.
    """
    metric, means = comparison.results.task.headline, []
    for place in comparison.finished(entry).values():
        found = []
        for name in comparison.sets_of("in_domain"):
            scores = comparison.scores(place, name, metric, more=True)[comparison.counted(name)]
            scores = scores[np.isfinite(scores).all(axis=1)]
            if scores.shape[1] >= count and len(scores):
                found.append(expected_best(scores, count, comparison.sign))
        if found:
            means.append(float(np.concatenate(found).mean()))
    return float(np.mean(means)) if means else None
