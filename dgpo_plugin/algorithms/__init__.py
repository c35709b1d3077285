"""One file an algorithm: its loss on tensors first, then its configuration, how to sample for it and what it costs."""

from typing import Any

from dgpo_plugin.algorithms.base import Algorithm, Cost, Metric, Random
from dgpo_plugin.algorithms.rollout import Batch, Layout, Rollout
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.fields import AlgorithmConfig

__all__ = ["Algorithm", "AlgorithmConfig", "Batch", "Cost", "Layout", "Metric", "Random", "Rollout", "algorithm_of"]


def algorithm_of(config: AlgorithmConfig) -> type[Algorithm[Any, Any]]:
    """The class that a configuration is for."""
    found: type[Algorithm[Any, Any]] = ALGORITHMS.load(config.name)
    return found
