"""The order in which the prompt groups of a run are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgpo_plugin.common.seeding import derive_seed


def draw_prompt_groups(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts whose groups are sampled in one iteration.

    The prompts are shuffled once per pass and the passes laid end to end, so every prompt is drawn
    equally often, and iteration ``k`` can be asked for without replaying the ones before it.

    Args:
        count: prompts in the set.
        per_iteration: prompt groups an iteration (P).
        iteration: from 0.
        seed: the run's seed.

    Returns:
        P indices in ``[0, count)``.
    """
    positions = range(iteration * per_iteration, (iteration + 1) * per_iteration)
    orders = {epoch: _shuffled(count, epoch, seed) for epoch in {position // count for position in positions}}
    return [orders[position // count][position % count] for position in positions]


def _shuffled(count: int, epoch: int, seed: int) -> Sequence[int]:
    generator = np.random.default_rng(derive_seed(seed, "prompt order", epoch))
    return [int(index) for index in generator.permutation(count)]
