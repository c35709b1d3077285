"""Several modules that each job asks one after the other, of which a device has room for one: each comes once.

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

from dgpo_plugin.models.memory import at_work

T = TypeVar("T")


class _Wanted(Exception):
    """A job asks a module that is not there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def in_turn(jobs: Sequence[Callable[[], T]], modules: Sequence[nn.Module], device: torch.device) -> list[T]:
    """Do jobs that call modules, with one module at a time on a device and nothing computed twice.

    Every job is started, and stops at the first module that it needs. Then that one comes, and all jobs are started
    again: what they were told before they are told again, from main memory, and each goes on to the next module.

    Args:
        jobs: without any effect but their result; they ask the same things each time.
    """
    results: dict[int, T] = {}
    answers: list[list[Any]] = [[] for _ in jobs]
    present: nn.Module | None = None
    while len(results) < len(jobs):
        wanted: nn.Module | None = None
        with at_work([] if present is None else [present], device):
            for number in range(len(jobs)):
                if number in results:
                    continue
                try:
                    with _answering(modules, present, answers[number], device):
                        results[number] = jobs[number]()
                    answers[number] = []
                except _Wanted as stop:
                    answers[number] = [_kept(answer) for answer in answers[number]]
                    wanted = wanted or stop.module
        present = wanted
    return [results[number] for number in range(len(jobs))]


@contextlib.contextmanager
def _answering(
    modules: Sequence[nn.Module], present: nn.Module | None, answers: list[Any], device: torch.device
) -> Iterator[None]:
    """Have modules repeat the answers so far; then the present one gives further ones, any other says it is wanted."""
    before = iter(list(answers))
    replaced = [vars(module).get("forward") for module in modules]

    def instead(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            for answer in before:
                return send_to_device(answer, device)
            if module is not present:
                raise _Wanted(module)
            answers.append(own(*args, **kwargs))
            return answers[-1]

        return forward

    for module in modules:
        module.forward = instead(module)
    try:
        yield
    finally:
        for module, own in zip(modules, replaced, strict=True):
            del module.forward  # the class's own shows again
            if own is not None:
                module.forward = own


def _kept(answer: Any) -> Any:
    """An answer in main memory, without the layers before the last two: nobody reads those of a first encoder.

    Of two CLIPs and a thousand texts all layers would be eight gigabytes.
    """
    hidden = answer.get("hidden_states") if isinstance(answer, dict) else None
    if hidden is not None:
        answer = type(answer)(**answer)
        answer["hidden_states"] = (*[None] * (len(hidden) - 2), *hidden[-2:])
    return send_to_device(answer, "cpu")
