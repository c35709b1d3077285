"""What makes a denoiser faster, whatever its family, and leaves its numbers as they were but for rounding."""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


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


def contiguous_tokens(denoiser: nn.Module) -> None:
    """Have the layers behind joint attention take its tokens as one piece each, copied once.

    What is cut off the joint sequence is not contiguous, and torch would copy it for every product, the adapter's
    included, and without oneDNN's bf16 kernels on a CPU. It is done to the base, so that it has the same bits with and
    without an adapter, whoever adds it.
    """
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith((".to_out.0", ".to_add_out")):
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in given)


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
