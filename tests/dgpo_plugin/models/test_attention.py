"""Attention where it is differentiated: gradients in one layout, and in checkpointed blocks the forward's kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgpo_bench.gpu.published import published
from dgpo_bench.gpu.random_model import random_conditioning, random_model
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.attention import checkpoint_blocks, even_gradients
from dgpo_plugin.models.policy import Policy
from tests.conftest import needs_bf16
from tests.dgpo_plugin.broken_bases import Bases
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast

Layout = tuple[Any, ...]
PROMPTS = ["a cat", "two blue squares and a triangle"]


@pytest.fixture
def layouts() -> Iterator[dict[Layout, set[tuple[int, ...]]]]:
    """The strides of the gradients of attention's output, by what torch keeps cuDNN's backward by."""
    found: dict[Layout, set[tuple[int, ...]]] = defaultdict(set)
    real = functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        out = real(query, key, value, *rest, **named)
        if out.requires_grad:
            layout = tuple((tuple(x.shape), x.stride()) for x in (query, key, value))
            out.register_hook(lambda gradient: found[layout].add(gradient.stride()))
        return out

    with mock.patch.object(functional, "scaled_dot_product_attention", watched):
        yield found


def policy_of(name: str, bases: Bases) -> Policy:
    width, tokens = (FAMILIES[name].width, FAMILIES[name].tokens) if name in FAMILIES else (32, 1)
    config = ModelConfig(path=str(bases(name)), width=width, height=width, max_sequence_length=tokens, precision="fp32")
    return Policy(load_model(config), LoraConfig(rank=4), seed=0)


def differentiate(policy: Policy) -> dict[str, Tensor]:
    torch.manual_seed(0)
    latents, asked = torch.randn(2, *policy.model.latent_shape), policy.model.encode(PROMPTS)
    policy.velocity(latents, 0.5, asked).square().mean().backward()
    return {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["shapes", *FAMILIES])
def test_one_layout_of_attention_has_gradients_of_one_layout(
    name: str, checkpointed: bool, bases: Bases, layouts: dict[Layout, set[tuple[int, ...]]]
) -> None:
    """Else torch runs the kernel that it made for the first of them on all (pytorch pull request 191576)."""
    policy = policy_of(name, bases)
    if checkpointed:
        checkpoint_blocks(policy.model.denoiser)
    differentiate(policy)
    assert layouts
    assert {layout: len(strides) for layout, strides in layouts.items()} == dict.fromkeys(layouts, 1)


def test_even_gradients_are_the_same_numbers(bases: Bases, layouts: dict[Layout, set[tuple[int, ...]]]) -> None:
    with mock.patch("dgpo_plugin.models.families.flux.even_gradients"):
        uneven = policy_of("flux", bases)
    before = differentiate(uneven)
    assert max(map(len, layouts.values())) == 2  # or FLUX.1 needs this no more
    for parameter in uneven.parameters.values():
        parameter.grad = None
    even_gradients(uneven.model.denoiser)
    after = differentiate(uneven)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-8)


@needs_bf16
def test_checkpointed_blocks_take_the_forwards_kernel_again() -> None:
    """In half precision on a CPU the forward's is not torch's choice, and torch refuses another one's graph."""
    config = ModelConfig(path="shapes", precision="bf16")
    whole, again = (Policy(load_model(config), LoraConfig(rank=4), seed=0) for _ in range(2))
    checkpoint_blocks(again.model.denoiser)
    for policy in (whole, again):
        torch.manual_seed(1)
        for parameter in policy.parameters.values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    expected, found = differentiate(whole), differentiate(again)
    assert len(found) == len(whole.parameters)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_what_was_allowed_before_is_allowed_after(bases: Bases) -> None:
    def switches() -> list[bool]:
        cuda = torch.backends.cuda
        return [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]

    before = switches()
    policy = policy_of("flux", bases)
    checkpoint_blocks(policy.model.denoiser)
    differentiate(policy)
    assert switches() == before


def test_attention_is_written_out_in_updates_alone_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small pictures in bf16 on a CPU; against the kernel that torch takes by itself."""
    config = ModelConfig(path="", precision="bf16", width=32, height=32, max_sequence_length=16)
    model = random_model(published("sd35").tiny(), config, torch.device("cpu"), encoders=False)
    policy = Policy(model, LoraConfig(rank=4, alpha=8), 0, random_conditioning(model, 1))
    latents, asked = torch.randn(2, *model.latent_shape), random_conditioning(model, 2)
    written_out: list[bool] = []

    def watch(*_: object) -> None:
        written_out.append(not torch.backends.cuda.flash_sdp_enabled())

    model.denoiser.register_forward_pre_hook(watch)

    def update() -> tuple[Tensor, Tensor]:
        with policy.updating():
            with policy.as_reference():
                base = policy.velocity(latents, 0.5, asked)
            out = policy.velocity(latents, 0.5, asked)
            assert torch.equal(out, base), "an adapter that changes nothing has the base's very numbers"
            out.square().mean().backward()
        gradients = [p.grad.flatten() for p in policy.parameters.values() if p.grad is not None]
        for p in policy.parameters.values():
            p.grad = None
        return out.detach(), torch.cat(gradients)

    ours = update()
    policy.velocity(latents, 0.5, asked, keep=True)
    with torch.no_grad():
        policy.velocity(latents, 0.5, asked)
    monkeypatch.setattr("dgpo_plugin.models.attention.FEW_PLACES", 0)
    usual = update()
    assert written_out == [True, True, True, False, False, False]
    for one, other in zip(ours, usual, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()
