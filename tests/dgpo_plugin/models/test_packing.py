"""FLUX's tokens against diffusers' own packing."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline

from dgpo_plugin.models.families.flux import pack, unpack

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pipeline", [FluxPipeline, QwenImagePipeline])
def test_tokens_are_the_pipelines_own(pipeline: type, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = pack(latents)
    theirs = pipeline._pack_latents(latents, 2, 3, 4, 6)  # type: ignore[attr-defined]  # noqa: SLF001
    assert torch.equal(tokens, theirs)
    assert tokens.shape == (2, 2 * 3, 3 * 4)
    assert tokens.is_contiguous()
    assert torch.equal(unpack(tokens, 2, 3), latents)
