"""Which GPUs a run of a comparison has: one a process, its own, so that no two runs are timed against each other."""

from __future__ import annotations

import os
import sys

from dgpo_plugin.common.errors import UserError

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of which a Linux has that can give CUDA (or ROCm) a GPU: of NVIDIA's driver, of Windows' underneath, of AMD's."""


def may_have_gpus() -> bool:
    """Whether there may be GPUs, told without importing torch, which takes a second; False is certain on Linux."""
    return sys.platform != "linux" or any(map(os.path.exists, GPU_FILES))


def gpu_count() -> int:
    """How many CUDA (or ROCm) devices this process may use; 0 where runs go to the CPU."""
    import torch

    from dgpo_plugin.distributed.device import runs_on_cpu

    return 0 if runs_on_cpu() or not torch.cuda.is_available() else torch.cuda.device_count()


def gpu_names() -> list[str]:
    """Names of the GPUs that runs may use, one each; none where runs go to the CPU."""
    from dgpo_plugin.distributed.device import device_names

    return device_names() if gpu_count() else []


def runs_at_once(requested: int | None, gpus: int, processes: int = 1) -> int:
    """How many runs to have at once: as requested, else as many as there are GPUs for; on a CPU two, of one process.

    Args:
        processes: of each run.

    Raises:
        UserError: more than there are GPUs for.
    """
    if gpus == 0:
        return requested or max(1, 2 // processes)
    there = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
    if processes > gpus:
        raise UserError(f"--processes {processes}: {there}, and a process needs its own")
    if requested is not None and requested * processes > gpus:
        each = "a run needs its own" if processes == 1 else f"a run needs {processes} of its own"
        raise UserError(f"--jobs {requested}: {there}, and {each}")
    return requested or gpus // processes


def pin(worker: int, processes: int = 1) -> None:
    """Let this process see the GPUs of the numbered worker alone; call it before anything uses CUDA.

    Where CUDA_VISIBLE_DEVICES is set, the worker gets its share of what that names.

    Args:
        processes: of a worker: the second of two workers with four each sees GPUs 4 to 7.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    own = range(worker * processes, (worker + 1) * processes)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in own)
