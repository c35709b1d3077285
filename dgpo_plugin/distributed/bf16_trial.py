"""Run by :mod:`dgpo_plugin.distributed.processor` in a process that may die of it: does bf16 work here, how fast?

Reads ``{"path": sys.path, "threads": n, "work": [[rows, in, out, times], ...]}`` from standard input. Writes two lines
of JSON: before anything is computed ``{"fp16": whether oneDNN says that it computes in float16, or cannot be asked}``,
and then ``{"error": relative to float32, "fp32": seconds, "bf16": seconds}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_WIDTH, MAX_FLOPS = 8192, 5e8
"""The largest product that is timed: larger ones are cut, which changes nothing in which type is faster."""
ADAPTER_RANK = 16
"""Of the adapter beside each layer that is timed."""
TIMING_SECONDS = 0.4
"""How long the timing takes, or as long as two rounds do."""


def die_quietly() -> None:
    """Have this process die, if it does, without a core file, and without the dialog that Windows would show."""
    try:
        import resource
    except ImportError:
        import ctypes

        if sys.platform == "win32":
            ctypes.windll.kernel32.SetErrorMode(0x8003)
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_network(dtype: Any) -> list[Any]:
    """Run what a diffusion model is made of, forward and backward, on fixed numbers: outputs and gradients, float32."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Any:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    picture = drawn(2, 32, 16, 16).requires_grad_()
    hidden = functional.conv2d(picture, drawn(64, 32, 3, 3), padding=1)
    hidden = functional.conv2d(hidden.to(memory_format=torch.channels_last), drawn(64, 64, 3, 3), padding=1)
    tokens = functional.layer_norm(hidden.flatten(2).transpose(1, 2), (64,))
    query, key, value = functional.linear(tokens, drawn(192, 64)).view(2, 256, 3, 1, 64).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value).flatten(0, 2)
    inner = functional.gelu(functional.linear(mixed, drawn(256, 64), drawn(256)))
    out = torch.addmm(mixed, inner, drawn(256, 64)) + torch.bmm(inner[None], drawn(1, 256, 64))[0]
    out.float().square().mean().backward()
    return [out.detach().float(), picture.grad.float()]


def disagreement() -> float:
    """The relative difference between bf16 and float32; what rounding alone gives is under a hundredth."""
    import torch

    pairs = zip(run_network(torch.bfloat16), run_network(torch.float32), strict=True)
    return max(float((bf16 - fp32).norm() / fp32.norm()) for bf16, fp32 in pairs)


def adapted_layer(x: Any, weight: Any, down: Any, up: Any) -> Any:
    """Apply a normalization, a linear layer with its adapter, and a nonlinearity."""
    from torch.nn.functional import gelu, layer_norm, linear

    x = layer_norm(x, x.shape[-1:])
    return gelu(linear(x, weight) + linear(linear(x, down), up))


def time_work(work: list[list[int]], threads: int) -> dict[str, float]:
    """Seconds for all the layers in each type: each layer forward, and forward with a backward to its inputs.

    With what stands around a layer in training, which gains less than the large product or nothing: an adapter's two
    small products, a normalization and a nonlinearity. Without it bf16 looked 1.9 times as fast on a Xeon with AMX
    where whole iterations took the same time.

    The best of rounds in which the types take turns, so that other work on the machine cannot decide; where one thread
    computes, its own time is taken instead of the clock's (which is too coarse on Windows).
    """
    import time

    import torch

    now = time.thread_time if threads == 1 and sys.platform != "win32" else time.perf_counter
    layers = []
    for rows, inputs, outputs, times in work:
        inputs, outputs = min(inputs, MAX_WIDTH), min(outputs, MAX_WIDTH)
        rows = max(1, min(rows, int(MAX_FLOPS / (2 * inputs * outputs))))
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            down, up = torch.randn(ADAPTER_RANK, inputs), torch.randn(outputs, ADAPTER_RANK)
            given = [tensor.to(dtype) for tensor in (weight, down, up)]
            layers.append((name, times, x.to(dtype).requires_grad_(), given, [float("inf")]))
    started, rounds = now(), 0
    while rounds < 2 or now() - started < TIMING_SECONDS:
        for _, _, x, weights, best in layers:
            began = now()
            with torch.no_grad():
                adapted_layer(x, *weights)
            adapted_layer(x, *weights).sum().backward()
            if rounds > 0:  # the first makes the kernels
                best.append(now() - began)
        rounds += 1
    seconds = {"fp32": 0.0, "bf16": 0.0}
    for name, times, _, _, best in layers:
        seconds[name] += times * min(best)
    return seconds


def main() -> None:
    """Answer a request on standard input, as the top of this file describes."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    die_quietly()
    import torch

    torch.set_num_threads(request["threads"])
    answer = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    print(json.dumps({"fp16": bool(answer is None or answer())}), flush=True)
    print(json.dumps({"error": disagreement(), **time_work(request["work"], request["threads"])}), flush=True)


if __name__ == "__main__":
    main()
