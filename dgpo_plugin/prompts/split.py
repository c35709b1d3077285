"""Train and test sides of what can be asked for, the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def test_side(keys: Iterable[str], share: float) -> frozenset[str]:
    """A share of the different keys, rounded up."""
    ordered = in_any_order(sorted(set(keys)), str)
    return frozenset(ordered[: math.ceil(len(ordered) * share)])


def in_any_order(items: Sequence[T], name: Callable[[T], str]) -> list[T]:
    """Shuffled by the hash of their names."""
    return sorted(items, key=lambda item: hashlib.blake2b(name(item).encode(), digest_size=8).digest())
