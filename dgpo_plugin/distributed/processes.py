"""How an iteration's images are split over processes, and what the processes tell each other.

The number of processes never changes the result (docs/architecture.md, section 5). Where an update's prompt groups
divide by the processes each has whole groups (``Layout.share``); else image n belongs to process n modulo their number.
Whatever depends on a whole group that is spread (DGPO's weight) is computed from the whole group everywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.distributed.device import runs_on_cpu

T = TypeVar("T")
PROCESS_TIMEOUT = 1800.0
"""Seconds that a process waits for the others, unless told otherwise."""


class FailedTogether(UserError):
    """A user error that all processes raise at the same place, so that they can still do something together."""


class LostProcess(UserError):
    """Another process is gone or does not answer; what it was that ended it, this one cannot know."""


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; alone by default, and then nothing is sent anywhere.

    Attributes:
        lockstep: all must run the denoiser equally often, because each holds a part of it.
    """

    rank: int = 0
    count: int = 1
    lockstep: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> Tensor:
        """The indices below ``total`` that are this process's, rising, (n,), int64."""
        return torch.arange(self.rank, total, self.count)

    def even_share(self, total: int) -> tuple[list[int], int]:
        """This process's share of so many things, and how many of its first ones are its own.

        Shares are equally long, because a sharded base needs every process in every forward: what is beyond the last
        thing repeats it, and is to be thrown away.
        """
        share = self.share(-(-total // self.count) * self.count)
        return share.clamp(max=total - 1).tolist(), int((share < total).sum())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same everywhere."""
        if self.count == 1:
            return tensor
        with _others_alive():
            summed: Tensor = reduce(tensor, reduction="sum")
        return summed

    def largest(self, number: Tensor) -> Tensor:
        """The largest of all processes' numbers, each a tensor of no axis."""
        return self.assemble(number[None], torch.tensor([self.rank]), self.count).max()

    def assemble(self, values: Tensor, indices: Tensor, total: int) -> Tensor:
        """Every process's (n, ...) values in one (total, ...) tensor, the same everywhere, exactly.

        Args:
            indices: where in it this process's values belong, (n,), int64.
        """
        whole = values.new_zeros(total, *values.shape[1:])
        whole[indices.to(values.device)] = values
        return self.sum(whole)

    def fail_together(self, problem: str | None) -> None:
        """Raise the first process's problem on all of them, so that none waits for one that has left.

        Raises:
            FailedTogether: ``problem`` is not None on some process.
        """
        problems = [problem]
        if self.count > 1:
            with _others_alive():
                problems = gather_object([problem])
        for rank, message in enumerate(problems):
            if message is not None:
                raise FailedTogether(message if self.count == 1 else f"process {rank}: {message}")

    def on_main(self, work: Callable[[], object]) -> None:
        """Do something on the first process alone.

        Raises:
            FailedTogether: it raised a UserError; on all of them.
            LostProcess: another process is gone.
        """
        problem: str | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                problem = str(error)
        if self.count > 1:
            with _others_alive():
                (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise FailedTogether(problem)

    def decided_by_main(self, work: Callable[[], T]) -> T:
        """What the first process's ``work`` gives, on all of them.

        Raises:
            UserError: as :meth:`on_main`.
        """
        found: list[Any] = [None]

        def find() -> None:
            found[0] = work()

        self.on_main(find)
        if self.count > 1:
            with _others_alive():
                found = broadcast_object_list(found)
        answer: T = found[0]
        return answer


def join_processes(timeout: float = PROCESS_TIMEOUT) -> Processes:
    """Meet the other processes of ``accelerate launch`` or ``torchrun``, if there are any; on CPUs through gloo.

    Args:
        timeout: seconds that a process waits for the others wherever they meet; the first call's holds.

    Raises:
        UserError: the launcher started several, but they did not find each other, or one left before all were there.
    """
    with _others_alive():
        # accelerate looks for the others on CPUs only if it is told to.
        state = PartialState(cpu=runs_on_cpu(), timeout=timedelta(seconds=timeout))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started but {state.num_processes} found each other; "
            f"check the accelerate configuration"
        )
    return Processes(state.process_index, state.num_processes)


def leave_processes() -> None:
    """End this process at once if it is one of several and all its work is done.

    The interpreter's own way out runs against the communication libraries' threads, and now and then one of them
    aborts a process whose run is complete and saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextlib.contextmanager
def _others_alive() -> Iterator[None]:
    """The backend's error about a process that is gone, as one line; every other error as it is."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise LostProcess(
            f"another process is gone, or did not answer within training.process_timeout; see what it said before "
            f"({reason}); go on with dgpo resume"
        ) from error


_GLOO_LOST = re.compile(
    r"closed by peer|reset by peer|timed out waiting|pair closure|socket closed|broken pipe|connection refused|"
    r"fullmesh failed",
    re.IGNORECASE,
)
"""What gloo says, in a plain RuntimeError, of a peer that no longer answers."""


_NCCL_OWN = re.compile(r"cuda (error|failure)|ncclUnhandledCuda|ncclInvalid|out of memory", re.IGNORECASE)
"""What NCCL says of this process's own failure, in the same class as that of a peer."""


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective's error tells of another process, and not of this one's memory, device or arguments."""
    backend = torch.distributed
    text = str(error)
    if isinstance(error, (backend.DistBackendError, backend.DistNetworkError, backend.DistStoreError)):
        return _NCCL_OWN.search(text) is None
    return type(error) is RuntimeError and _GLOO_LOST.search(text) is not None
