"""Copies of the adapter's weights that trail behind those that are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def move_towards(copy: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """copy <- decay copy + (1 - decay) parameters, in place and in float32: EMA and old policy."""
    torch._foreach_lerp_(list(copy.values()), [parameters[name] for name in copy], 1 - decay)
