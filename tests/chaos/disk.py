"""A disk that fails at the n-th operation on a folder, told by Python's own audit events; nothing here needs root.

The operation is answered with an error before it reaches the system, or the process ends itself by a signal. What a
write to a file that is open already meets is tried by RLIMIT_FSIZE instead (:mod:`tests.chaos.forks`).
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
"""Events of Python's audit that change a folder, besides opening a file to write to it."""


@dataclass(frozen=True)
class Fault:
    """What happens at an operation.

    Attributes:
        at: which, counted from 1.
        answer: the error's number; 0 for a signal.
        stays: whether all that follow are answered so too.
        signal: that ends the process.
    """

    at: int
    answer: int = 0
    stays: bool = False
    signal: int = 0


class Disk:
    """What counts the operations on a folder, and answers one; :meth:`hook` is for ``sys.addaudithook``.

    Its count is seen by the process that forked this one, too.
    """

    def __init__(self) -> None:
        self._count = mmap.mmap(-1, 8)
        self.watch(None)

    def watch(self, folder: Path | None, fault: Fault | None = None) -> None:
        """Count from 1 again, what is done in a folder; None for nothing."""
        self._folder, self._fault, self.count = folder, fault, 0

    @property
    def count(self) -> int:
        """Operations on the folder so far."""
        number: int = struct.unpack("q", self._count[:8])[0]
        return number

    @count.setter
    def count(self, number: int) -> None:
        self._count[:8] = struct.pack("q", number)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear of an operation before it is done."""
        if self._folder is None or not (event in CHANGES or (event == "open" and _writes(arguments))):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        # shutil.rmtree names what it removes relative to a handle of the folder above.
        if os.path.isabs(path) and not str(path).startswith(str(self._folder)):
            return
        self.count += 1
        fault = self._fault
        if fault is None or self.count < fault.at or (self.count > fault.at and not fault.stays):
            return
        if fault.signal:
            os.kill(os.getpid(), fault.signal)
        raise OSError(fault.answer, os.strerror(fault.answer), str(path))


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
