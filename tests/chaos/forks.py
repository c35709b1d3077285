"""Commands in forks of one process that has imported everything: 200 of them cost 200 runs, and one start."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from .disk import Disk, Fault

HANGS = 300.0
"""Seconds without a second's work, its children's included, after which a command hangs, however busy a machine is."""
NOBODY = 65534


@dataclass(frozen=True)
class Way:
    """How a command is started.

    Attributes:
        fault: of the disk.
        file_size: bytes that no file may grow beyond.
        unprivileged: as nobody, whom a read-only folder stops, if this is root.
        environment: on top of this process's.
        program: a module that is run in the command's place: it imports everything anew, and nothing is counted.
    """

    fault: Fault | None = None
    file_size: int | None = None
    unprivileged: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    program: str = ""


@dataclass
class Command:
    """A command that was started in a fork."""

    pid: int
    output: int
    disk: Disk
    started: float = field(default_factory=time.monotonic)

    def code(self, wait: bool = False) -> int | None:
        """How it ended, negative for a signal; None if it is running."""
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative for a signal), what it said, seconds, operations on the folder."""

    code: int
    said: str
    seconds: float
    operations: int

    @property
    def errors(self) -> list[str]:
        """Its lines that tell of an error or of a stop."""
        starts = ("error: ", "stopped after", "stopped; ")
        return [line for line in self.said.splitlines() if line.startswith(starts)]


def adopt_orphans() -> None:
    """Become the parent of whatever outlives its own (Linux), so that it is seen."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def start(main: click.Command, arguments: Sequence[str], folder: Path, way: Way = Way()) -> Command:
    """Start a command in a fork.

    Args:
        folder: whose operations are counted, and may be faulty.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 1 << 20)  # F_SETPIPE_SZ: it is read when all is over
    disk = Disk()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Command(pid, reading, disk)
    code = 1
    try:
        os.close(reading)
        _become_a_process(writing, way)
        if way.program:
            os.execv(sys.executable, [sys.executable, "-m", way.program, *arguments])
        disk.watch(folder, way.fault)
        sys.addaudithook(disk.hook)
        main(list(arguments))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def end(command: Command) -> Ended:
    """Wait for a command's end and read what it said; one that hangs is killed, and its code is 1000."""
    code, worked, since = None, 0.0, time.monotonic()
    while code is None:
        code = command.code()
        if code is None and time.monotonic() - since > HANGS / 10 and _work(command.pid) > worked + 1:
            worked, since = _work(command.pid), time.monotonic()
        if code is None and time.monotonic() - since > HANGS:
            os.kill(command.pid, signal.SIGKILL)
            command.code(wait=True)
            code = 1000
        time.sleep(0.005)
    seconds = time.monotonic() - command.started
    orphans = others_left()
    os.set_blocking(command.output, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        while block := os.read(command.output, 1 << 16):
            said += block
    os.close(command.output)
    text = said.decode("utf-8", "replace") + "".join(f"left behind: {name}\n" for name in orphans)
    return Ended(code, text, seconds, command.disk.count)


def _work(pid: int) -> float:
    """Seconds of computing that a process and its children have done."""
    times = [0.0]
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            times += [each.cpu_times().user, each.cpu_times().system]
    return sum(times)


def others_left(patience: float = 20.0) -> list[str]:
    """What was started by commands that have ended, and is still there after a while; it is killed."""
    me, until = psutil.Process(), time.monotonic() + patience
    while time.monotonic() < until:
        if not (left := [child for child in me.children() if child.pid not in _kept]):
            return []
        for child in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.01)
    names = []
    for child in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(child.cmdline())[:200])
            child.kill()
    return names


_kept: set[int] = set()
"""Processes that may be there: a second rank, a server."""


@contextlib.contextmanager
def beside(*commands: Command) -> Any:
    """Commands that go on while others end in the block."""
    _kept.update(command.pid for command in commands)
    try:
        yield
    finally:
        _kept.difference_update(command.pid for command in commands)


def _become_a_process(output: int, way: Way) -> None:
    os.environ.update(way.environment)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    if way.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (way.file_size, way.file_size))
    if way.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def fill_disk(command: Command, size: int) -> None:
    """Let no file of a running command grow beyond ``size`` bytes: its writes fail, as on a full disk."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (size, size))


DISK_ERRORS: Mapping[str, int] = {"full": errno.ENOSPC, "read-only": errno.EROFS, "broken": errno.EIO}
Harm = Callable[[Command], object]


def hold_memory(command: Command, size: int) -> None:
    """Let a running command have no more than ``size`` bytes of address space: what it asks for beyond is refused."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(command.pid, resource.RLIMIT_AS, (size, size))
