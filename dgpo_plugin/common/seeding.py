"""Random draws that depend on what they are for, never on who draws them.

Every draw is seeded by (seed, purpose, iteration, prompt, image, ...), so that the number of
processes, the micro-batch size and a restart cannot change it (docs/architecture.md, section 5).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings; equal keys give equal seeds everywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise of the given shape, float32, on the CPU (so every device gets the same)."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(derive_seed(*key)))


def seed_globals(seed: int) -> None:
    """Have Python's, NumPy's and torch's own generators, the accelerators' too, begin at a seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Have Python's, NumPy's and torch's own generators begin at a seed in the block, and put them back after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(device_type=_accelerator()):
        try:
            seed_globals(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _accelerator() -> str:
    """The kind of this machine's accelerators; without any, one of which there are none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if found is None else found.type
