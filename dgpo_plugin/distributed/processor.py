"""Whether to compute in bf16 on this processor: tried out, not believed.

A processor's own word is worth little: some virtual machines announce AMX and then refuse its instructions, which ends
the process; and many processors only emulate bf16, slower than float32. So, before bf16 is first used on a CPU:

1. it is tried in a process that may die of it, and timed there against float32
   (:mod:`dgpo_plugin.distributed.bf16_trial`);
2. if that died, it is tried once more with AMX masked, and then AMX is masked for this process too;
3. ``precision: auto`` takes bf16 if that works and is clearly faster; bf16 by name is refused if it does not work.

What a trial found is kept on disk. Nothing is tried where float32 is asked for, or on a GPU, or at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.faults import signal_name
from dgpo_plugin.common.files import cache_folder, write_text_atomically

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
Work = tuple[tuple[int, int, int, int], ...]
"""Linear layers as (rows, inputs, outputs, how many of them)."""
COMMON_WORK: Work = ((1024, 512, 512, 1), (1024, 512, 2048, 1))
"""What is timed where no model's own layers are asked about."""
LAYERS_TIMED = 6
"""Of a model's, those that compute most."""
MIN_SPEEDUP = 1.1
"""So many times as fast bf16 must be for ``auto`` to take it: less than that is within what a busy machine does."""
MAX_ERROR = 0.05
"""Relative, of a small network in bf16; rounding alone gives .01."""
ISA_VARIABLE, ISA_WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
"""oneDNN reads it once, when it first computes: no instructions beyond those, so no AMX."""
FAULTS = ("SIGILL", "SIGSEGV", "SIGBUS")
"""Signals that end a process at an instruction that was refused."""
TRIAL_TIMEOUT = 120.0
"""Seconds; a trial takes three."""
TRIAL_VERSION = 2
"""Changed with what the trial does; results of another version are not read."""
TRIAL = Path(__file__).with_name("bf16_trial.py")


class Trial(BaseModel):
    """What bf16 did in a process of its own.

    Attributes:
        problem: why it cannot be used; empty if it can.
        masked: only with AMX masked.
        fp16: whether oneDNN said, in that process, that it computes in float16.
        mask_shows: it said so without the mask, and not with it: so a process can be asked which it has.
        fp32, bf16: seconds for the same work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    problem: str = ""
    masked: bool = False
    fp16: bool = True
    mask_shows: bool = False
    fp32: float = 0.0
    bf16: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times as fast bf16 was as float32."""
        return self.fp32 / self.bf16


@dataclass
class ProcessState:
    """What this process knows by now.

    Attributes:
        trials: what was tried, by the work and the number of threads.
        bf16_is_ready: it can compute in bf16, masked if need be.
    """

    trials: dict[tuple[Work, int], Trial] = field(default_factory=dict)
    bf16_is_ready: bool = False


state = ProcessState()


def settled(
    where: str, precision: str, device: torch.device, work: Callable[[], Work] | None = None, threads: int | None = None
) -> Precision:
    """The precision to compute in on a device: the one asked for, or what ``auto`` stands for there.

    Says in a line of its log what ``auto`` is and why, and where bf16 by name is slow.

    Args:
        where: the setting, for messages.
        work: that is timed on a CPU; None for layers of common sizes.
        threads: that will compute; None for this process's.

    Raises:
        UserError: bf16 by name, which this processor or this process cannot.
    """
    if precision in ("fp32", "fp16"):
        return "fp32" if precision == "fp32" else "fp16"
    if device.type != "cpu":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native or precision == "bf16" else "fp32"
    if precision == "bf16" and bf16_is_ready():
        return "bf16"
    trial = bf16_trial(work() if work else COMMON_WORK, threads or torch.get_num_threads())
    problem = trial.problem or _make_ready(trial)
    if precision == "bf16":
        if problem:
            raise UserError(f"{where} bf16: does not work here ({problem}); set it to fp32")
        if trial.ratio < 1:
            log.info("%s bf16: runs, but its layers take %.1f times as long as fp32's here", where, 1 / trial.ratio)
        return "bf16"
    if problem:
        log.info("%s auto: fp32; bf16 does not work here (%s)", where, problem)
        return "fp32"
    mask = f"; its AMX, announced and refused, is masked ({ISA_VARIABLE}={ISA_WITHOUT_AMX})" if trial.masked else ""
    log.info("%s auto: %s", where, _comparison(trial) + mask)
    return "bf16" if trial.ratio >= MIN_SPEEDUP else "fp32"


def bf16_is_ready() -> bool:
    """Whether it is known by now that this process can compute in bf16."""
    return state.bf16_is_ready


def trust_bf16() -> None:
    """Take the word of the process that started this one, which has tried and, if need be, masked AMX for both."""
    state.bf16_is_ready = True


def _comparison(trial: Trial) -> str:
    if trial.ratio >= MIN_SPEEDUP:
        return f"bf16, whose layers take 1/{trial.ratio:.1f} of fp32's time on this processor"
    if trial.ratio >= 1:
        least = f"{MIN_SPEEDUP - 1:.0%}"
        return f"fp32; bf16's layers are {trial.ratio - 1:.0%} faster on this processor, of {least} that it takes"
    return f"fp32; bf16's layers take {1 / trial.ratio:.1f} times as long on this processor"


def _make_ready(trial: Trial) -> str:
    """Mask AMX for this process and those it starts, if bf16 only works so; why it is not known to be, else nothing.

    oneDNN has read the variable already if it has computed anything, or was asked anything. So it is asked what it can
    do now: if it still says float16, or where its answer tells nothing, the mask is taken not to be in force.
    """
    if trial.masked and not bf16_is_ready():
        before = os.environ.get(ISA_VARIABLE)
        os.environ[ISA_VARIABLE] = ISA_WITHOUT_AMX
        if not trial.mask_shows or computes_in_fp16():
            os.environ.pop(ISA_VARIABLE)
            if before is not None:
                os.environ[ISA_VARIABLE] = before
            return (
                f"the processor refuses the AMX that it announces, which can be masked only before a process first "
                f"computes: start it with {ISA_VARIABLE}={ISA_WITHOUT_AMX}"
            )
    elif ISA_VARIABLE in os.environ and computes_in_fp16() and not trial.fp16:
        return f"{ISA_VARIABLE} was set when this process had computed already: start it with that"
    trust_bf16()
    return ""


def computes_in_fp16() -> bool:
    """Whether oneDNN says that it computes in float16, in this process; True where torch has no such question."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return ask is None or bool(ask())


# ---- the trial


def bf16_trial(work: Work, threads: int) -> Trial:
    """Try bf16 here, once a process, and once a machine as long as that stays the same."""
    if (work, threads) in state.trials:
        return state.trials[work, threads]
    file = _trial_file(work, threads)
    trial = _read_trial(file)
    if trial is None:
        trial, conclusive = _try(work, threads)
        if conclusive and file is not None:
            with contextlib.suppress(UserError):  # a folder that cannot be written to: tried again next time
                write_text_atomically(file, trial.model_dump_json() + "\n")
    state.trials[work, threads] = trial
    return trial


@dataclass(frozen=True)
class _Ended:
    """A trial's process, ended.

    Attributes:
        code: its exit code; None if it was never started or not waited for.
        results: the lines it wrote.
        reason: the last line of its errors.
    """

    code: int | None
    results: list[dict[str, float]]
    reason: str

    @property
    def fault(self) -> str | None:
        """The signal of an instruction that was refused, if that ended it."""
        name = None if self.code is None else signal_name(self.code)
        return name if name in FAULTS else None


def _try(work: Work, threads: int) -> tuple[Trial, bool]:
    """Try bf16 in a process as it is and, if that dies of it, in one with AMX masked; and whether to keep what came."""
    plain = _run_trial(work, threads, {})
    if plain.fault is None:
        return _judge(plain)
    died = f"a trial of it was ended by {plain.fault}"
    if ISA_VARIABLE in os.environ:
        return Trial(problem=f"{died}, with {ISA_VARIABLE}={os.environ[ISA_VARIABLE]}"), True
    masked = _run_trial(work, threads, {ISA_VARIABLE: ISA_WITHOUT_AMX})
    trial, conclusive = _judge(masked)
    if masked.fault or trial.problem:
        return Trial(problem=died), conclusive
    shows = bool(plain.results and plain.results[0]["fp16"] and not masked.results[0]["fp16"])
    return trial.model_copy(update={"masked": True, "mask_shows": shows}), True


def _judge(ended: _Ended) -> tuple[Trial, bool]:
    """What an ended process shows of bf16; and whether that is worth keeping."""
    if ended.fault:
        return Trial(problem=f"a trial of it was ended by {ended.fault}"), True
    if ended.code != 0 or len(ended.results) != 2:
        # Once it has begun to compute, an error is an answer; before that it tells nothing of bf16.
        return Trial(problem=f"a trial of it failed ({ended.reason})"), len(ended.results) == 1 and ended.code == 1
    error, fp32, bf16 = (ended.results[1][name] for name in ("error", "fp32", "bf16"))
    if not error < MAX_ERROR:
        return Trial(problem=f"its results are wrong (relative error {error:.2g})"), True
    return Trial(fp16=bool(ended.results[0]["fp16"]), fp32=fp32, bf16=bf16), True


def _run_trial(work: Work, threads: int, variables: dict[str, str]) -> _Ended:
    """Run the trial with some environment variables besides this process's."""
    request = json.dumps({"path": sys.path, "threads": threads, "work": work})
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, str(TRIAL)],
            input=request,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRIAL_TIMEOUT,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired:
        return _Ended(None, [], f"not done after {TRIAL_TIMEOUT:.0f} s")
    except OSError as error:
        return _Ended(None, [], f"no process could be started: {error.strerror}")
    results = []
    with contextlib.suppress(ValueError):  # a line that was cut off
        for line in done.stdout.splitlines():
            results.append(json.loads(line))
    return _Ended(done.returncode, results, (done.stderr.strip().splitlines() or ["no reason given"])[-1])


# ---- what is kept of it


def _read_trial(file: Path | None) -> Trial | None:
    if file is None:
        return None
    try:
        return Trial.model_validate_json(file.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None  # never written, or damaged: tried again


def _trial_file(work: Work, threads: int) -> Path | None:
    """The file that keeps the trial of some work on this machine as it is; None for a user without a home."""
    key = json.dumps([*machine(), TRIAL_VERSION, work, threads])
    try:
        return cache_folder() / f"bf16-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    except RuntimeError:
        return None


def machine() -> list[str]:
    """What a trial's result hangs on besides its work: processor, flags, system, torch, and what limits them.

    The same processor may refuse AMX under one host and not under another, so a start of the system is part of it: a
    home folder may be shared, and a virtual machine may come up elsewhere.
    """
    settings = [os.environ.get(name, "") for name in (ISA_VARIABLE, "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    started = _first_line("/proc/sys/kernel/random/boot_id", "")
    return [*_processor(), platform.node(), platform.release(), started, torch.__version__, *settings]


@functools.cache
def _processor() -> tuple[str, str]:
    """The processor's model and its flags."""
    names = [name for name in dir(torch.cpu) if name.startswith("_is_") and name.endswith("_supported")]
    flags = " ".join(f"{name}={getattr(torch.cpu, name)()}" for name in names)
    model = _first_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return model, _first_line("/proc/cpuinfo", "flags") or flags


def _first_line(path: str, start: str) -> str:
    """The first line with a given start of one of Linux's files; empty elsewhere."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(start)), "")


# ---- a model's own work


def linear_work(module: nn.Module, run: Callable[[], object]) -> Work:
    """The module's linear layers as a call uses them, those that compute most; free on the meta device."""
    seen: Counter[tuple[int, int, int]] = Counter()

    def count(layer: nn.Linear, _inputs: object, out: torch.Tensor) -> None:
        seen[out.numel() // layer.out_features, layer.in_features, layer.out_features] += 1

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, nn.Linear)]
    run()
    for hook in hooks:
        hook.remove()
    work = [(*shape, times) for shape, times in seen.items()]
    work.sort(key=lambda one: (-one[0] * one[1] * one[2] * one[3], one))
    return tuple(work[:LAYERS_TIMED])
