"""Which GPU a run of a comparison has: one each, so that no two are timed against each other."""

from __future__ import annotations

import os

from dgpo_plugin.common.errors import UserError


def gpu_count() -> int:
    """How many CUDA (or ROCm) devices this process may use; 0 where runs go to the CPU."""
    import torch

    from dgpo_plugin.distributed.device import runs_on_cpu

    return 0 if runs_on_cpu() or not torch.cuda.is_available() else torch.cuda.device_count()


def gpu_names() -> list[str]:
    """Names of the GPUs that runs may use, one each; none where runs go to the CPU."""
    from dgpo_plugin.distributed.device import device_names

    return device_names() if gpu_count() else []


def runs_at_once(requested: int | None, gpus: int) -> int:
    """How many runs to have at once: as requested, else one per GPU, on a CPU two.

    Raises:
        UserError: more than there are GPUs.
    """
    if gpus == 0:
        return requested or 2
    if requested is not None and requested > gpus:
        raise UserError(
            f"--jobs {requested}: there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}, and a run needs its own"
        )
    return requested or gpus


def pin(worker: int) -> None:
    """Let this process see the GPU of the numbered worker alone; call it before anything uses CUDA.

    Where CUDA_VISIBLE_DEVICES is set, the worker gets its share of what that names.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[worker] if visible else str(worker)
