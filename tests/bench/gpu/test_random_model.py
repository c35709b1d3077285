"""Published models with random weights: the parts that they have, and what they can do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgpo_bench.gpu.published import published, published_models
from dgpo_bench.gpu.random_model import family_of, random_model
from dgpo_bench.gpu.rows import ROWS
from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.config.fields import ModelConfig

pytestmark = pytest.mark.fast


def test_every_family_has_a_published_model_and_the_measured_ones_a_tiny_one() -> None:
    assert {model.pipeline for model in published_models().values()} == set(FAMILIES)
    for row in ROWS:
        assert not row.model or published(row.model).rehearsal is not None


def test_a_random_model_has_the_published_parts_and_encodes_texts() -> None:
    config = ModelConfig(path="", precision="fp32", width=32, height=32, max_sequence_length=16)
    model = random_model(published("sd35").tiny(), config, torch.device("cpu"))
    assert type(model) is family_of(published("sd35"))
    assert model.encode(["a cat", "a dog"]).tensors["context"].shape == (2, 77 + 16, 32)
    assert model.decode(torch.randn(1, *model.latent_shape)).shape == (1, 3, 32, 32)
    weights = [p for p in model.denoiser.parameters() if p.ndim > 1]
    assert all(p.std() > 0 for p in weights)
    again = random_model(published("sd35").tiny(), config, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.parameters(), again.denoiser.parameters(), strict=True))
    bare = random_model(published("sd35").tiny(), config, torch.device("cpu"), encoders=False)
    assert all(isinstance(e, nn.Module) and next(e.parameters()).device.type == "meta" for e in bare.encoders)
