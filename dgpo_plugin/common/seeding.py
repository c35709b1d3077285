"""Random draws that depend on what they are for, never on who draws them.

Every draw is seeded by (seed, purpose, iteration, prompt, image, ...), so that the number of
processes, the micro-batch size and a restart cannot change it (docs/architecture.md, section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings; equal keys give equal seeds everywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise of the given shape, float32, on the CPU (so every device gets the same)."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(derive_seed(*key)))
