"""Attention where it is differentiated: by which kernel, by the same one again, and with gradients that it can take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

FEW_PLACES = 1024
"""Of latents: 256 pixels squared, with the usual VAE."""
ALLOWED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: cuda.math_sdp_enabled,
}
"""Whether torch may choose a kernel now; its switches are for processors too, whatever their module's name."""


def attention_to_differentiate(latents: Tensor, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The attention kernel of passes that are differentiated, or compared with such: torch's choice but on some CPUs.

    On a CPU torch's kernel for half precision takes several times as long backwards as the products written out, which
    are computed in float32, and keep all their weights: only small pictures can afford that.

    Args:
        latents: (N, channels, ...), all but the first two its places.
        dtype: the denoiser's.
    """
    slow = latents.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    if slow and latents[0, 0].numel() <= FEW_PLACES:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def checkpoint_blocks(denoiser: Any) -> None:
    """Have the backward compute a denoiser's blocks again, with the attention kernels of the first time.

    It runs when whatever chose those is over, and torch refuses a graph that another kernel made.
    """

    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=_as_now)

    denoiser.enable_gradient_checkpointing(checkpointed)


def _as_now() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    allowed = [kernel for kernel, is_allowed in ALLOWED.items() if is_allowed()]
    return contextlib.nullcontext(), sdpa_kernel(allowed)


def even_gradients(denoiser: nn.Module) -> None:
    """Have the gradients of attention's output come in one layout, whatever of it a block goes on with.

    torch (2.11 at least) keeps cuDNN's kernels for the backward, its choice on Hopper and Blackwell cards, by the
    layout of queries, keys and values alone. Where the same kernel meets a gradient in another layout than the one that
    it was made for, it reads at wrong places: wrong numbers, or an illegal memory access (pytorch pull request 191576).
    """
    for module in denoiser.modules():
        if hasattr(module, "processor"):
            module.register_forward_hook(_with_even_gradients)


def _with_even_gradients(_: nn.Module, _given: Any, out: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(_EvenGradient.apply(part) for part in out)
    return _EvenGradient.apply(out)


class _EvenGradient(torch.autograd.Function):
    """Its input, whose gradient is made contiguous."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()
