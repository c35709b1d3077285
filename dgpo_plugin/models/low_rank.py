"""A linear layer's low-rank update: added in training and beside a base's own weights by the same product."""

from __future__ import annotations

from torch import Tensor, addmm, nn
from torch.utils.hooks import RemovableHandle


def updated(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """out + scale up down x, in the type of x."""
    inner = nn.functional.linear(x, down.to(x.dtype))
    return addmm(out.flatten(0, -2), inner.flatten(0, -2), up.to(x.dtype).t(), alpha=scale).view(out.shape)


def attach(layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> RemovableHandle:
    """Have a linear layer add scale up down x to what it gives, beside its own weights, whatever they are packed in.

    The numbers are those of training. Merged instead, a small update would be lost in half-precision weights, and
    packed ones cannot take any.

    Args:
        down, up: (r, inputs) and (outputs, r).

    Returns:
        What takes it away again.
    """
    down, up = down.to(layer.weight.device), up.to(layer.weight.device)

    def add(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        nonlocal down, up
        x = given[0].to(out.dtype)
        if down.device != x.device:  # the layer was placed elsewhere meanwhile
            down, up = down.to(x.device), up.to(x.device)
        return updated(out, x, down, up, scale)

    return layer.register_forward_hook(add)
