"""Which of a machine's GPUs is meant: ``cuda`` alone is the current one of a thread, and in a new thread the first."""

from __future__ import annotations

import os

import torch


def this_device() -> torch.device:
    """This process's GPU by its number, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return numbered(found or torch.device("cpu"))


def numbered(device: torch.device) -> torch.device:
    """A device with this process's number, if it is a GPU without one."""
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
