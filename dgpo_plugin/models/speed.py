"""What makes a denoiser faster, whatever its family, and leaves its numbers as they were but for rounding."""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn


def fuse_norms(denoiser: nn.Module) -> None:
    """Put torch's RMSNorm, one kernel on a GPU, in the place of diffusers', which is seven; the weights stay.

    Half-precision numbers are rounded once instead of twice.
    """
    for parent in list(denoiser.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is RMSNorm and norm.bias is None:
                fused = nn.RMSNorm(tuple(norm.dim), eps=norm.eps, elementwise_affine=False)
                if norm.weight is not None:
                    fused.elementwise_affine = True
                    fused.weight = norm.weight
                setattr(parent, name, fused.train(norm.training))


def compile_blocks(denoiser: nn.Module) -> None:
    """Have torch.compile make faster kernels of the blocks that a denoiser repeats, at their first use.

    Block by block it takes a fraction of the time that the whole denoiser would.
    """
    # One forward serves blocks of several makes, with and without the adapter, gradients and guidance's second half.
    dynamo = torch._dynamo.config  # noqa: SLF001 (torch names it in its own messages)
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    for block in blocks(denoiser, "_repeated_blocks") or blocks(denoiser, "_no_split_modules"):
        block.compile()


def blocks(denoiser: nn.Module, attribute: str) -> list[nn.Module]:
    """The modules of the classes that a diffusers denoiser lists under an attribute; none if it lists no class."""
    names = getattr(denoiser, attribute, None) or []
    return [module for module in denoiser.modules() if type(module).__name__ in names]
