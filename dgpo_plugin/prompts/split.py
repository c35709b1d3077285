"""Which prompts are held out for tests, the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def held_out_keys(keys: Iterable[str], share: float) -> frozenset[str]:
    """A share of the different keys, rounded up, picked by their hashes."""
    ordered = shuffled_by_hash(sorted(set(keys)), str)
    return frozenset(ordered[: math.ceil(len(ordered) * share)])


def shuffled_by_hash(items: Sequence[T], name: Callable[[T], str]) -> list[T]:
    """Items in the order of their names' hashes, which is as good as any, and always the same."""
    return sorted(items, key=lambda item: hashlib.blake2b(name(item).encode(), digest_size=8).digest())
