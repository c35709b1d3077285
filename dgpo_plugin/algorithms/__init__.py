"""One file an algorithm: its loss on tensors first, then its configuration, how to sample for it and what it costs."""

from typing import Any

from dgpo_plugin.algorithms.base import Algorithm, Cost, Metric, Random
from dgpo_plugin.algorithms.rollout import Batch, Layout, Rollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.fields import AlgorithmConfig

__all__ = ["Algorithm", "AlgorithmConfig", "Batch", "Cost", "Layout", "Metric", "Random", "Rollout", "algorithm_of"]


def algorithm_of(config: AlgorithmConfig) -> type[Algorithm[Any, Any]]:
    """The class that a configuration is for.

    Raises:
        UserError: it is not a whole :class:`Algorithm`, as another package's or one's own may be.
    """
    found = ALGORITHMS.load(config.name)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise UserError(f"algorithm {config.name}: is no dgpo_plugin.algorithms.Algorithm; derive it from that")
    lacking = sorted(found.__abstractmethods__)
    if lacking:
        raise UserError(f"algorithm {config.name}: lacks {', '.join(lacking)}; docs/adding-an-algorithm.md says what")
    return found
