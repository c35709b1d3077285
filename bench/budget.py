"""What a run may spend on training, and what an iteration costs: in denoiser evaluations, or in measured operations.

On paper a backward counts two evaluations. How many of the denoiser's own floating-point operations a backward through
an adapter takes is counted on it (:func:`dgpo_bench.cost.count_flops`), and is less: where the budget is in operations,
methods that differentiate much get as many more iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgpo_plugin.algorithms import algorithm_of
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig

from .gpu.flops import Flops
from .size import Size


@dataclass(frozen=True)
class IterationCost:
    """What an iteration takes of the denoiser.

    Attributes:
        evaluations: images through it, over all processes; a forward with its backward counts 3.
        differentiated: those of them that are of forwards with their backwards.
    """

    evaluations: float
    differentiated: float

    def operations(self, flops: Flops) -> float:
        """Floating-point operations, from those of one image's passes."""
        return (self.evaluations - self.differentiated) * flops.forward + self.differentiated / 3 * flops.training

    def spends(self, size: Size, flops: Flops) -> float:
        """How much of a size's budget, in its unit."""
        return self.evaluations if size.flops is None else self.operations(flops)


def cost_of(record: Mapping[str, float]) -> IterationCost:
    """What an iteration took, from its line of ``metrics.jsonl``."""
    return IterationCost(record["denoiser_evaluations"], record["differentiated_evaluations"])


def expected_cost(config: RunConfig) -> IterationCost:
    """What an iteration is to take at most: with every optional pass, and none left out for groups of equal rewards."""
    cost, images = algorithm_of(config.algorithm).cost(config), config.training.images
    guided = 1 if cost.training_guidance == 1 else 2
    return IterationCost(images * (cost.sampling + cost.training), images * 3 * cost.trained_steps * guided)


def check_budgets(size: Size, configs: Mapping[str, RunConfig], flops: Flops) -> None:
    """Refuse a budget that is too small for one iteration, as expected, of any of several entries.

    Raises:
        UserError: it is.
    """
    for entry, config in configs.items():
        spent = expected_cost(config).spends(size, flops)
        if spent > size.budget:
            raise _too_small(size, entry, spent)


def check_budget(size: Size, entry: str, record: Mapping[str, float], flops: Flops) -> None:
    """Refuse a budget that the first iteration is too much for.

    Raises:
        UserError: it is.
    """
    spent = cost_of(record).spends(size, flops)
    if record["iteration"] == 1 and spent > size.budget:
        raise _too_small(size, entry, spent)


def _too_small(size: Size, entry: str, spent: float) -> UserError:
    told = f"{spent:.0f}" if size.flops is None else f"{spent:.3g}"
    return UserError(f"{size.budget_option}: one iteration of {entry} takes {told}; give at least ten times that")
