"""Floating-point operations, counted another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dgpo_bench.gpu.flops import count_flops
from dgpo_bench.gpu.published import published
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models.load import model_skeleton

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("name", "side"), [("sdxl", 1024), ("sd35", 512), ("flux1", 512)])
def test_flops_are_those_of_every_layer_and_every_attention(
    name: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted another way: by each layer's own shapes as it is called, and by attention's."""
    shapes, config = published(name), ModelConfig(path=str(tmp_path), precision="bf16", width=side, height=side)
    shapes.write_configurations(tmp_path)
    counted = 0

    def layer(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal counted
        weight: Any = module.weight  # a convolution's has its window, a linear layer's has none
        counted += 2 * out.numel() * weight[0].numel()

    def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
        nonlocal counted
        counted += 2 * query.numel() * key.shape[-2] * 2
        return torch.empty_like(query)

    with torch.device("meta"), torch.no_grad():
        model = model_skeleton(config)
        for module in model.denoiser.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(layer)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        model.velocity(torch.zeros(1, *model.latent_shape), 0.5, model.blank_conditioning(1))
        monkeypatch.undo()
    with_adapter = count_flops(shapes, config, LoraConfig(rank=1, alpha=1))
    assert with_adapter.forward == pytest.approx(counted, rel=0.003)
    # Backward without the frozen weights' gradients costs about a forward again.
    assert 1.95 < with_adapter.training / with_adapter.forward < 2.2


def test_flops_of_one_layer_by_hand() -> None:
    """A tiny Stable Diffusion 3.5, doubled in depth: the difference is one block's, counted here."""
    tiny = published("sd35").tiny()
    config = ModelConfig(path="", precision="fp32", width=32, height=32, max_sequence_length=16)

    def of(layers: int) -> int:
        parts = {**tiny.parts, "transformer": {**tiny.parts["transformer"], "num_layers": layers}}
        return count_flops(tiny.model_copy(update={"parts": parts}), config, LoraConfig(rank=4, alpha=4)).forward

    width, image, text, rank = 64, (32 // 2 // 2) ** 2, 77 + 16, 4
    tokens = image + text
    products = 4 * width * width * tokens + 2 * 4 * width * width * tokens  # attention's four, the feed-forward's two
    adapters = 8 * 2 * width * rank * tokens / 2  # four projections a stream, down and up
    modulation = 2 * 6 * width * width  # of the time and the pooled text, once an image and stream
    scores = 2 * tokens * tokens * width
    assert of(3) - of(2) == 2 * (products + adapters + modulation + scores)
