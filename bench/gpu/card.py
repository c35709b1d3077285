"""The card: its name, how fast its maker says it is and how fast it is, its memory, its state while it works."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dgpo_plugin.distributed.device import best_device, device_memory

from ..timing import median_seconds

NOMINAL_BF16 = {
    "H200": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070": 58.2,
    "RTX 3090": 71.0,
    "RTX 3080": 59.5,
    "RTX 3060": 25.5,
    "MI300X": 1307.4,
}
"""Dense bf16 TFLOP/s with float32 sums, by the makers' data sheets; the first name that a card's name has in it."""
MOST_SECONDS = 4.0
"""Seconds of timed calls of one kind, after which there is no further one."""


@dataclass
class Peaks:
    """The most memory that was in use in a block, bytes; 0 where the device does not say.

    Attributes:
        allocated: in tensors.
        reserved: by torch's allocator, which keeps what it had.
    """

    allocated: int = 0
    reserved: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peaks]:
    """Measure the most memory that a block uses, into a :class:`Peaks` that is filled when the block is over."""
    peaks = Peaks()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if device.type == "cuda":
        peaks.allocated, peaks.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    elif device.type == "mps":  # no high-water mark there: what is held now
        peaks.allocated, peaks.reserved = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()


def nominal_tflops(name: str) -> float | None:
    """A card's bf16 TFLOP/s as its maker says; None for a card that is not in the table."""
    return next((rate for part, rate in NOMINAL_BF16.items() if part in name), None)


def measure_card(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """The device's ceilings: TFLOP/s of square products, and GB/s of a copy (bytes read and written)."""
    side = 256 if tiny else 8192
    found: dict[str, Any] = {}
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for label, dtype in kinds.items():
        if device.type == "cpu" and dtype != torch.float32:
            continue  # not every processor can
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        spent = median_seconds(lambda a=a, b=b: a @ b, device, rounds=20, most_seconds=MOST_SECONDS)  # type: ignore[misc]
        found[f"{label}_tflops"] = 2 * side**3 / spent / 1e12
    source = torch.randn((1 << 20) if tiny else (1 << 28), device=device)
    target = torch.empty_like(source)
    spent = median_seconds(lambda: target.copy_(source), device, rounds=20, most_seconds=MOST_SECONDS)
    found["copy_gbs"] = 2 * source.nbytes / spent / 1e9
    return found


def describe_device() -> dict[str, Any]:
    """The device's name, kind, memory (bytes) and what drives it."""
    device = best_device()
    name, total = device_memory()
    described: dict[str, Any] = {
        "device": name if device.type != "cpu" else "CPU",
        "kind": device.type,
        "memory": total,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["cuda"] = torch.version.cuda or torch.version.hip
        described["nominal_bf16_tflops"] = nominal_tflops(name)
    return described


def device_state() -> dict[str, Any]:
    """Driver, clock (MHz), temperature (C) and power (W) at this moment, where ``nvidia-smi`` tells them."""
    command = shutil.which("nvidia-smi")
    if command is None or not torch.cuda.is_available():
        return {}
    names = {"driver": "driver_version", "clock": "clocks.sm", "temperature": "temperature.gpu", "power": "power.draw"}
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = [f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        output = subprocess.run([command, *query], capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: value.strip() for name, value in zip(names, output.splitlines()[0].split(","), strict=True)}
