"""Which of a machine's GPUs is meant: ``cuda`` alone is the current one of a thread, and in a new thread the first."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import psutil
import torch


def this_device() -> torch.device:
    """This process's GPU by its number, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return numbered(found or torch.device("cpu"))


def numbered(device: torch.device) -> torch.device:
    """A device with this process's number, where it is a GPU without one."""
    if device.type == "cpu" or device.index is not None or not torch.accelerator.is_available():
        return device
    rank = os.environ.get("LOCAL_RANK")
    # Modulo, as accelerate places its processes: each may have been shown one GPU only.
    count = max(1, torch.accelerator.device_count())
    index = torch.accelerator.current_device_index() if rank is None else int(rank) % count
    return torch.device(device.type, index)


def make_current(device: torch.device) -> None:
    """Have ``cuda`` alone mean this GPU in the calling thread, for code that is not ours."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


def runs_on_cpu() -> bool:
    """Whether a run here computes on the processor: told to by ``ACCELERATE_USE_CPU``, or for want of anything else."""
    from accelerate.utils import parse_flag_from_env  # a reward's server does without

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()


def best_device() -> torch.device:
    """This process's GPU if there is one, by its number."""
    return torch.device("cpu") if runs_on_cpu() else this_device()


def device_memory() -> tuple[str, int]:
    """Name and bytes of the memory that a run here would have: the GPU's, or the computer's."""
    if torch.cuda.is_available() and not runs_on_cpu():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return "this computer's memory", psutil.virtual_memory().total


def device_names() -> list[str]:
    """What a run here computes on: every accelerator by its name, in their order, or the processor alone."""
    if runs_on_cpu():
        return [processor_name()]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # or runs_on_cpu
    # Not every kind of accelerator tells its name.
    name_of = getattr(torch.get_device_module(kind.type), "get_device_name", lambda _index: kind.type)
    return [str(name_of(index)) for index in range(torch.accelerator.device_count())]


def processor_name() -> str:
    """The processor as its maker calls it, where the system tells; else its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
