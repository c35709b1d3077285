"""What makes a denoiser faster leaves its numbers, its gradients and the names of its weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from dgpo_bench.gpu.published import published
from dgpo_bench.gpu.random_model import random_conditioning, random_model
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.speed import compile_blocks, fuse_norms

CONFIG = ModelConfig(path="", precision="fp32", width=32, height=32, max_sequence_length=16)


@pytest.mark.fast
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("affine", [True, False])
def test_fused_norms_are_the_same_function(dtype: torch.dtype, close: float, affine: bool) -> None:
    """Against the definition in float64: x / sqrt(mean of squares + eps) * weight, and its gradient."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"norm": RMSNorm(32, eps=1e-6, elementwise_affine=affine).to(dtype)})
    if affine:
        holder["norm"].weight.data = torch.randn(32, dtype=dtype)
    fuse_norms(holder)
    assert type(holder["norm"]) is nn.RMSNorm
    x = torch.randn(4, 5, 32, dtype=dtype, requires_grad=True)
    slope = torch.randn(4, 5, 32, dtype=dtype)
    out = holder["norm"](x)
    out.backward(slope)
    exact = x.detach().double().requires_grad_()
    weight = holder["norm"].weight.detach().double() if affine else 1.0
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    expected.backward(slope.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert (out.double() - expected).norm() / expected.norm() <= close
    assert (x.grad.double() - exact.grad).norm() / exact.grad.norm() <= close


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sd35", "qwen-image", "z-image"])
def test_a_model_with_fused_norms_gives_the_same_velocity(name: str) -> None:
    model = random_model(published(name).tiny(), CONFIG, torch.device("cpu"), encoders=False)
    latents, asked = torch.randn(2, *model.latent_shape), random_conditioning(model, 2)
    before, names = model.velocity(latents, 0.5, asked), [n for n, _ in model.denoiser.named_parameters()]
    assert any(type(module) is RMSNorm for module in model.denoiser.modules())
    fuse_norms(model.denoiser)
    assert not any(type(module) is RMSNorm for module in model.denoiser.modules())
    assert [n for n, _ in model.denoiser.named_parameters()] == names
    torch.testing.assert_close(model.velocity(latents, 0.5, asked), before, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sd35", "flux1", "qwen-image"])
def test_products_behind_joint_attention_get_tokens_in_one_piece(name: str) -> None:
    """As diffusers hands them over, they are cut out of a longer sequence."""
    model = random_model(published(name).tiny(), CONFIG, torch.device("cpu"), encoders=False)
    latents, asked = torch.randn(2, *model.latent_shape), random_conditioning(model, 2)
    behind = [m for path, m in model.denoiser.named_modules() if path.endswith((".to_out.0", ".to_add_out"))]
    pieces: list[bool] = []
    for layer in behind:
        layer.register_forward_hook(lambda _, given, out: pieces.append(given[0].is_contiguous()))
    together = model.velocity(latents, 0.5, asked)
    assert pieces == [True] * len(behind)
    for layer in behind:
        layer._forward_pre_hooks.clear()  # noqa: SLF001 (torch removes hooks one by one, by handle)
    torch.testing.assert_close(model.velocity(latents, 0.5, asked), together, rtol=1e-5, atol=1e-6)
    assert name != "sd35" or not all(pieces)  # the others' attention copies them itself


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a processor")
def test_compiled_blocks_give_the_same_velocity_gradient_and_copies() -> None:
    """The policy, the frozen base and an older copy of the adapter, through one compiled denoiser."""
    results = []
    for compiled in (False, True):
        model = random_model(published("sd35").tiny(), CONFIG, torch.device("cpu"), encoders=False)
        policy = Policy(model, LoraConfig(rank=4, alpha=8), 0, random_conditioning(model, 1))
        torch.manual_seed(2)
        for parameter in policy.parameters.values():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        old = {name: torch.randn_like(p) * 0.1 for name, p in policy.parameters.items()}
        if compiled:
            compile_blocks(model.denoiser)
        latents, asked = torch.randn(2, *model.latent_shape), random_conditioning(model, 2)
        with torch.no_grad():
            guided = policy.velocity(latents, 0.5, asked, 3.0)
        with policy.as_reference():
            base = policy.velocity(latents, 0.5, asked)
        with policy.with_weights(old):
            older = policy.velocity(latents, 0.5, asked)
        out = policy.velocity(latents, 0.5, asked)
        out.square().mean().backward()
        grads = [p.grad for p in policy.parameters.values() if p.grad is not None]
        assert len(grads) == len(policy.parameters)
        results.append([guided, base, older, out.detach(), torch.cat([g.flatten() for g in grads])])
    plain, fast = results
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    # They differ from each other, or the test could not tell them apart.
    assert not torch.allclose(plain[1], plain[3], atol=1e-3)
    assert not torch.allclose(plain[2], plain[3], atol=1e-3)
