"""Which prompts are held out for tests, the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def held_out_keys(keys: Iterable[str], share: float) -> frozenset[str]:
    """A share of the different keys, rounded up, picked by their hashes."""
    return split_keys(keys, share)[0]


def split_keys(keys: Iterable[str], *shares: float) -> list[frozenset[str]]:
    """Disjoint parts of the different keys, a share of them each, rounded up, picked by their hashes."""
    ordered = shuffled_by_hash(sorted(set(keys)), str)
    parts, start = [], 0
    for share in shares:
        end = start + math.ceil(len(ordered) * share)
        parts.append(frozenset(ordered[start:end]))
        start = end
    return parts


def shuffled_by_hash(items: Sequence[T], name: Callable[[T], str]) -> list[T]:
    """Items in the order of their names' hashes, which is as good as any, and always the same."""
    return sorted(items, key=lambda item: hashlib.blake2b(name(item).encode(), digest_size=8).digest())
