"""How long something takes on a device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch


def wait_for(device: torch.device) -> None:
    """Wait until all that the device was given is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def median_seconds(
    work: Callable[[], object],
    device: torch.device,
    *,
    rounds: int = 5,
    most_seconds: float = math.inf,
    warm_up: bool = True,
) -> float:
    """The median time of some calls, in seconds.

    Args:
        rounds: how many calls, at least one.
        most_seconds: of calls together, after which there is no further one.
        warm_up: whether to make one more call first, which is not timed.
    """
    if warm_up:
        work()
    wait_for(device)
    spent: list[float] = []
    while len(spent) < rounds and sum(spent) < most_seconds:
        started = time.perf_counter()
        work()
        wait_for(device)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)
