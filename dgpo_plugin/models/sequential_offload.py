"""Jobs that call several modules one after the other, on a device with room for one of them: each comes once.

diffusers' pipelines ask all their text encoders about one batch of texts. With the encoders in main memory, that would
have each of them cross the bus for every batch: for a thousand texts hundreds of gigabytes, with a T5-XXL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn

from dgpo_plugin.models.memory import on_device

T = TypeVar("T")


class _ModuleAbsent(Exception):
    """A job calls a module that is not on the device."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def one_module_at_a_time(
    jobs: Sequence[Callable[[], T]], modules: Sequence[nn.Module], device: torch.device
) -> list[T]:
    """Do jobs that call modules, with one module at a time on a device and nothing computed twice.

    Every job is started, and stops at the first module that it needs. Then that one comes, and all jobs are started
    again: what earlier calls gave is repeated from main memory, and each job goes on to the next module.

    Args:
        jobs: without any effect but their result; they call the modules in the same way each time.

    Returns:
        The jobs' results, in their order.
    """
    results: dict[int, T] = {}
    outputs: list[list[Any]] = [[] for _ in jobs]
    present: nn.Module | None = None
    while len(results) < len(jobs):
        wanted: nn.Module | None = None
        with on_device([] if present is None else [present], device):
            for number in range(len(jobs)):
                if number in results:
                    continue
                try:
                    with _recorded(modules, present, outputs[number], device):
                        results[number] = jobs[number]()
                    outputs[number] = []
                except _ModuleAbsent as stop:
                    outputs[number] = [_in_main_memory(output) for output in outputs[number]]
                    wanted = wanted or stop.module
        present = wanted
    return [results[number] for number in range(len(jobs))]


@contextlib.contextmanager
def _recorded(
    modules: Sequence[nn.Module], present: nn.Module | None, outputs: list[Any], device: torch.device
) -> Iterator[None]:
    """Have modules repeat the outputs so far; then the present one adds further ones, any other says it is absent."""
    repeated = iter(list(outputs))
    replaced = [vars(module).get("forward") for module in modules]

    def recording(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            for output in repeated:
                return send_to_device(output, device)
            if module is not present:
                raise _ModuleAbsent(module)
            outputs.append(own(*args, **kwargs))
            return outputs[-1]

        return forward

    for module in modules:
        module.forward = recording(module)
    try:
        yield
    finally:
        for module, own in zip(modules, replaced, strict=True):
            del module.forward  # the class's own shows again
            if own is not None:
                module.forward = own


def _in_main_memory(output: Any) -> Any:
    """A module's output in main memory, without the layers before the last two: nobody reads those of a first encoder.

    Of two CLIPs and a thousand texts all layers would be eight gigabytes.
    """
    hidden = output.get("hidden_states") if isinstance(output, dict) else None
    if hidden is not None:
        output = type(output)(**output)
        output["hidden_states"] = (*[None] * (len(hidden) - 2), *hidden[-2:])
    return send_to_device(output, "cpu")
