"""The measurements, one function per kind of row: from its setting to what is kept of it."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models import pipeline
from dgpo_plugin.models.attention import checkpoint_blocks
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.speed import compile_blocks
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.plan import GIB

from ..throughput import PARTS
from ..timing import median_seconds, wait_for
from .card import MOST_SECONDS, measure_card, peak_memory
from .flops import Flops
from .random_model import random_conditioning
from .rows import Row
from .setting import PROMPTS, Setting

Measured = dict[str, Any]
MOST_ITERATION_SECONDS = 10.0
"""Seconds of timed iterations, after which no further one is begun."""


def iteration(setting: Setting) -> Measured:
    """Time whole iterations of a trainer, by part, and measure the most memory that they take, against the plan."""
    plan, flops, device = setting.plan(), setting.flops(), setting.device
    found: Measured = {
        "planned_bytes": plan.peak,
        "planned": {**plan.weights, **plan.phases, "encoding": plan.encoding},
    }
    with peak_memory(device) as loading:
        started = time.perf_counter()
        model = setting.random_model()
        found["draw_seconds"] = time.perf_counter() - started
        trainer = build_trainer(setting.config, model=model)
        wait_for(device)
        found["build_seconds"] = time.perf_counter() - started
    texts = [*PROMPTS, *PROMPTS][:8]
    found["encode_seconds_per_text"] = timed(lambda: model.encode(texts), setting, rounds=2) / len(texts)
    running = trainer.iterations()
    found["first_iteration_seconds"] = next(running)["seconds"]  # warms up, and makes the optimizer's state
    with peak_memory(device) as peaks:
        records = list(_until(running, 1 if setting.tiny else 5, MOST_ITERATION_SECONDS))
    found |= {"loading_bytes": loading.allocated, "peak_bytes": peaks.allocated, "reserved_bytes": peaks.reserved}
    found["seconds"] = statistics.median(r["seconds"] for r in records)
    for part in PARTS:
        found[f"{part}_seconds"] = statistics.median(r[f"{part}_seconds"] for r in records)
    found |= {"iterations": len(records), "images": setting.config.training.images}
    last = records[-1]
    found |= _tflops(last, flops, found["rollout_seconds"], found["training_seconds"])
    logged = ("grad_norm", *(metric.key for metric in trainer.algorithm.METRICS))
    found |= {name: last[name] for name in logged if name in last}
    if trainer.accelerator.scaler is not None:
        found["gradient_scale"] = trainer.accelerator.scaler.get_scale()
        found["optimizer_steps"] = trainer.steps
    if "aim" in setting.row.options:
        found["aim_bytes"] = setting.row.options["aim"] * GIB
    return found


def _tflops(record: dict[str, float], flops: Flops, rollout_seconds: float, training_seconds: float) -> Measured:
    """TFLOP/s of an iteration's two phases, from the evaluations that it counted."""
    differentiated = record["differentiated_evaluations"] / 3  # images of which each counted a forward and a backward
    # Forwards of kept graphs are among those and were the rollout's: they are taken off here.
    plain = record["denoiser_evaluations"] - record["rollout_evaluations"] - record["differentiated_evaluations"]
    work = plain * flops.forward + differentiated * flops.training
    return {
        "rollout_tflops": record["rollout_evaluations"] * flops.forward / rollout_seconds / 1e12,
        "training_tflops": work / training_seconds / 1e12,
    }


def _until(records: Iterator[dict[str, float]], count: int, most_seconds: float) -> Iterator[dict[str, float]]:
    """The first ``count`` records, fewer where they take longer than ``most_seconds`` together."""
    total = 0.0
    for record in itertools.islice(records, count):
        yield record
        total += record["seconds"]
        if total > most_seconds:
            return


def timed(work: Callable[[], object], setting: Setting, *, rounds: int = 5) -> float:
    """The median seconds of some calls on the setting's device, after one that warms up; fewer if they take long."""
    return median_seconds(work, setting.device, rounds=rounds, most_seconds=MOST_SECONDS)


class Workload:
    """The passes of a policy without encoders, on random inputs."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        plain = setting.row.options.get("plain_norms", False)
        with mock.patch.object(pipeline, "fuse_norms") if plain else contextlib.nullcontext():
            self.model: Model = setting.random_model(encoders=False)
        self.policy: Policy = setting.policy(self.model)
        self.model.place()
        if setting.config.training.gradient_checkpointing:
            checkpoint_blocks(self.model.denoiser)
        if setting.config.model.compile:
            compile_blocks(self.model.denoiser)

    def inputs(self, size: int) -> tuple[Tensor, Conditioning]:
        """Latents and conditioning of ``size`` images, the same each time."""
        torch.manual_seed(0)
        latents = torch.randn(size, *self.model.latent_shape, device=self.device)
        return latents, random_conditioning(self.model, 1)[[0] * size]

    def forward(self, size: int) -> Callable[[], Tensor]:
        """A pass of ``size`` images without gradient, to be called."""
        latents, conditioning = self.inputs(size)

        def run() -> Tensor:
            with torch.no_grad():
                return self.policy.velocity(latents, 0.5, conditioning)

        return run

    def training(self, size: int) -> Callable[[], Tensor]:
        """A pass of ``size`` images, and backward to the adapter's weights, to be called."""
        latents, conditioning = self.inputs(size)

        def run() -> Tensor:
            loss = self.policy.velocity(latents, 0.5, conditioning).square().mean()
            loss.backward()
            for parameter in self.policy.parameters.values():
                parameter.grad = None
            return loss.detach()

        return run


def rates(setting: Setting) -> Measured:
    """Seconds and memory of a forward, and of a forward and backward, by the images in it."""
    return rates_of(Workload(setting), setting)


def rates_of(workload: Workload, setting: Setting) -> Measured:
    """Seconds and memory as :func:`rates`, of a workload that is there already."""
    flops, base = setting.flops(), _allocated(setting.device)
    rows = []
    for size in setting.row.options["sizes"][: 1 if setting.tiny else None]:
        row: Measured = {"images": size}
        for name, work, count in (
            ("forward", workload.forward(size), flops.forward),
            ("training", workload.training(size), flops.training),
        ):
            started = time.perf_counter()
            try:
                with peak_memory(setting.device) as peaks:
                    spent = timed(work, setting, rounds=1 if setting.tiny else 5)
            except torch.OutOfMemoryError:
                row[name] = "out of memory"
                continue
            row[f"{name}_seconds"] = spent
            row[f"{name}_tflops"] = size * count / spent / 1e12
            row[f"{name}_bytes"] = peaks.allocated - base
            row[f"{name}_first_seconds"] = time.perf_counter() - started - spent
        rows.append(row)
    return {"resting_bytes": base, "sizes": rows}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated", "attention"),
    "product": ("gemm", "cutlass", "nvjet", "sm90_xmma", "ampere", "cublas", "gemv", "splitk", "conv"),
    "norm and reduction": ("norm", "reduce", "softmax", "welford"),
    "copy and cast": ("copy", "memcpy", "memset", "cat", "transpose", "fill"),
    "elementwise": ("elementwise", "vectorized", "unrolled", "foreach", "multi_tensor", "triton"),
}


def profile(setting: Setting) -> Measured:
    """Measure the time on the device by kind of kernel, its launches, and how long it had nothing to do."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    workload, size = Workload(setting), 2 if setting.tiny else 8
    found: Measured = {"images": size}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.device.type == "cuda" else [])]
    for name, work in (("forward", workload.forward(size)), ("training", workload.training(size))):
        spent = timed(work, setting, rounds=3)
        with profiled(activities=activities) as run:
            work()
            wait_for(setting.device)
        found[name] = {"seconds": spent, **_kernel_shares(run.events())}
    return found


def _kernel_shares(events: Iterable[Any]) -> Measured:
    """The device's seconds and launches among a profile's events, by kind of kernel, and the kernels that took most."""
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            one = kernels.setdefault(event.name, [0.0, 0])
            one[0] += event.time_range.elapsed_us() / 1e6
            one[1] += 1
    shares: dict[str, float] = {}
    for kernel, (total, _) in kernels.items():
        kind = next((k for k, words in KINDS.items() if any(w in kernel.lower() for w in words)), "other")
        shares[kind] = shares.get(kind, 0.0) + total
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:12]
    return {
        "busy_seconds": sum(total for total, _ in kernels.values()),
        "launches": int(sum(count for _, count in kernels.values())),
        "by_kind": shares,
        "most": [{"kernel": kernel[:90], "seconds": total, "launches": int(n)} for kernel, (total, n) in top],
    }


def numerics(setting: Setting) -> Measured:
    """Compare bf16 with float32 on the same weights: a rollout's latents, its matching errors, the loss's gradient.

    A rehearsal has float32 against float64: not every processor survives a product in bf16.
    """
    size, steps = (2, 2) if setting.tiny else (4, 10)
    workload = Workload(replace(setting, config=_in_float32(setting.config)))
    torch.manual_seed(1)
    for parameter in workload.policy.parameters.values():  # an adapter that does something
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    latents, conditioning = workload.inputs(size)
    types = (torch.float64, torch.float32) if setting.tiny else (torch.float32, torch.bfloat16)
    exact, rounded, again = (_passes(workload, (latents, conditioning), steps, dtype) for dtype in (*types, types[-1]))
    found: Measured = {f"{key}_relative_difference": _relative(rounded[key], exact[key]) for key in exact}
    found["same_bits"] = all(torch.equal(rounded[key], again[key]) for key in exact)
    return found | {"finite": all(bool(value.isfinite().all()) for value in rounded.values()), "steps": steps}


def _passes(
    workload: Workload, inputs: tuple[Tensor, Conditioning], steps: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is compared, in float64, with the frozen weights in ``dtype``; to be called with the larger type first."""
    latents, drawn = inputs
    for parameter in workload.model.denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    conditioning = Conditioning({k: t.to(dtype) if t.is_floating_point() else t for k, t in drawn.tensors.items()})
    x, sigmas = latents, [1 - n / steps for n in range(steps + 1)]
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            x = x + (after - now) * workload.policy.velocity(x, max(now, 1e-3), conditioning)
    clean = latents.flip(0)
    predicted = workload.policy.velocity(0.5 * latents + 0.5 * clean, 0.5, conditioning)
    error = (latents - clean - predicted).square().flatten(1).mean(1)
    error.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in workload.policy.parameters.values() if p.grad is not None])
    for parameter in workload.policy.parameters.values():
        parameter.grad = None
    return {"latents": x.double(), "error": error.detach().double(), "gradient": gradient.double()}


def _relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def _in_float32(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": "fp32"})})


def attention(setting: Setting) -> Measured:
    """Time a forward and a training pass by the kernel that computes attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    workload, size = Workload(setting), 2 if setting.tiny else 8
    found: Measured = {"images": size}

    def under(backend: Any, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return work()

        return run

    forward, training = workload.forward(size), workload.training(size)
    found["default"] = {"forward": timed(forward, setting), "training": timed(training, setting)}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name)
        try:
            found[name.lower()] = {
                "forward": timed(under(backend, forward), setting),
                "training": timed(under(backend, training), setting),
            }
        except RuntimeError as error:
            found[name.lower()] = str(error).splitlines()[0]
    return found


def layouts(row: Row, *, tiny: bool) -> Measured:
    """How far attention's gradients are from the products written out, where its own gradient comes in two layouts.

    As in FLUX.1: a slice of a wider tensor first, then one of its own; each of both, by the kernel that torch chooses.
    Made contiguous (:func:`dgpo_plugin.models.attention.even_gradients`) they are in one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from dgpo_plugin.distributed.device import best_device

    device, heads, places, width = best_device(), 2 if tiny else 24, 80 if tiny else 1152, 32 if tiny else 128
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    query, key, value = (torch.randn(4, places, heads, width, device=device, dtype=dtype) for _ in range(3))
    wide = torch.randn(4, places, 5 * heads * width, device=device, dtype=dtype)
    slopes = {"slice": wide[..., : heads * width], "whole": wide[..., : heads * width].contiguous()}

    def gradients(slope: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if row.options["even"]:
            slope = slope.contiguous()
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(out, (q, k, v), slope)])

    with sdpa_kernel(SDPBackend.MATH):
        exact = gradients(slopes["whole"])
    found: Measured = {}
    for name, slope in slopes.items():
        found[f"{name}_relative_difference"] = _relative(gradients(slope), exact)
    return found


def card(*, tiny: bool) -> Measured:
    """Measure the device alone; see :func:`dgpo_bench.gpu.card.measure_card`."""
    from dgpo_plugin.distributed.device import best_device

    return measure_card(best_device(), tiny=tiny)
