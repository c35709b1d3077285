"""Code that is not ours, called so that the run goes on as if it had not been: a user's reward, another package's."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.seeding import seed_globals

Switches = tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...]
"""Each as how it is read, and how it is put back."""


@contextlib.contextmanager
def others_code(*, new_seed: bool = False, given_up: threading.Event | None = None) -> Iterator[None]:
    """Put back after the block what it changed of what is everybody's.

    That is torch's gradients, inference mode and autocast (of this thread), its search for anomalies, its deterministic
    and its TF32 switches, its kinds of attention, its number of threads, the generators of Python, NumPy and torch, the
    working directory, and a standard stream that it took away.

    Args:
        new_seed: let the generators begin at the run's next random number; else they go on where they are, and are put
            back all the same. Two calls then draw two things, and a resumed run the same again.
        given_up: set by whoever no longer waits for the block; then nothing is put back, for what was there when it
            began may long have been changed by those who did not wait.

    Raises:
        UserError: it changed the default dtype or device, and so what is sampled beside it; they are put back too.
    """
    seed = int(torch.randint(2**32, ())) if new_seed else None
    given_up = given_up or threading.Event()
    # Leaving an inference mode puts all of a thread's autograd state back, whatever was entered inside it.
    with (
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        _same_generators(given_up),
        _same_switches(given_up),
    ):
        if seed is not None:
            seed_globals(seed)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        now_dtype, now_device = dtype, device
        try:
            yield
        finally:
            if not given_up.is_set():
                now_dtype, now_device = torch.get_default_dtype(), torch.get_default_device()
                torch.set_default_dtype(dtype)
                if now_device != device:
                    torch.set_default_device(None if device.type == "cpu" else device)
        for name, before, after in (("dtype", dtype, now_dtype), ("device", device, now_device)):
            if before != after:
                raise UserError(
                    f"changes torch's default {name} from {before} to {after}, and the model samples beside it; "
                    f"give {name}= where it makes tensors instead"
                )


@contextlib.contextmanager
def _same_generators(given_up: threading.Event) -> Iterator[None]:
    generators = _generators()
    before = [read() for read, _ in generators]
    try:
        yield
    finally:
        if not given_up.is_set():
            for (_, put_back), state in zip(generators, before, strict=True):
                put_back(state)


def _generators() -> Switches:
    """Python's, NumPy's and torch's, of each of this machine's accelerators."""
    everywhere = (
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return everywhere
    module = torch.get_device_module(accelerator.type)
    devices = range(module.device_count())
    return (
        *everywhere,
        *(
            (functools.partial(module.get_rng_state, n), functools.partial(module.set_rng_state, device=n))
            for n in devices
        ),
    )


@contextlib.contextmanager
def _same_switches(given_up: threading.Event) -> Iterator[None]:
    before = [read() for read, _ in SWITCHES]
    try:
        yield
    finally:
        if not given_up.is_set():
            for (read, put_back), value in zip(SWITCHES, before, strict=True):
                if value is not None and read() != value:
                    put_back(value)


def _matmul_precision() -> str | None:
    """What the older of torch's two switches says; None where only the newer one can be asked."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _folder() -> str | None:
    with contextlib.suppress(OSError):  # it may be gone
        return os.getcwd()
    return None


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _stream(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A standard stream, which is put back where nothing can be written any more: another may be a progress bar's."""

    def put_back(value: Any) -> None:
        now = getattr(sys, name)
        if now is None or getattr(now, "closed", False):
            setattr(sys, name, value)

    return lambda: getattr(sys, name), put_back


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _put_back_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _anomalies() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _put_back_anomalies(value: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(value[0], check_nan=value[1])


SWITCHES: Switches = (
    (_deterministic, _put_back_deterministic),
    (_anomalies, _put_back_anomalies),
    *(
        (getattr(torch.backends.cuda, f"{kind}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{kind}_sdp"))
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    ),
    _attribute(torch.backends.cudnn, "enabled"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    # First the newer switches, then the older: torch refuses to be asked for a mixture.
    _attribute(torch.backends.cuda.matmul, "fp32_precision"),
    _attribute(torch.backends.cudnn.conv, "fp32_precision"),  # type: ignore[attr-defined]
    (_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
    *(
        (
            functools.partial(torch.is_autocast_enabled, kind),
            functools.partial(torch.set_autocast_enabled, kind),
        )
        for kind in ("cpu", "cuda")
    ),
    (_folder, os.chdir),
    _stream("stdout"),
    _stream("stderr"),
)
"""What is everybody's, besides the generators."""
