"""One file an algorithm: its loss on tensors first, then how to sample for it and what it needs."""

from dgpo_plugin.algorithms.base import Algorithm, Draw, make_algorithm

__all__ = ["Algorithm", "Draw", "make_algorithm"]
