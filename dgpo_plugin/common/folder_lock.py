"""One process at a time works in a folder: a lock that the system drops with its process, and a note of whose it is."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import reason, remove_temporaries, write_text_atomically

log = logging.getLogger(__name__)
LOCK = ".lock"
OWNER = ".owner.json"
HEARTBEAT = 10.0
"""Seconds between two signs of life, where the file system cannot lock."""
SILENCE = 60.0
"""Seconds without one, after which a process is taken for dead."""
_CANNOT_LOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EIO}
"""What file systems without locks answer (CIFS, NFS without its lock daemon, some FUSE)."""


class Owner(BaseModel):
    """The process that works in a folder."""

    model_config = ConfigDict(extra="ignore")

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_dead(self) -> bool:
        """Whether it is known to be gone; of another computer's processes nothing is known."""
        return self.host == socket.gethostname() and not psutil.pid_exists(self.pid)


@dataclass(frozen=True)
class HeldFolder:
    """A folder that this process alone works in, as long as it stays where it is.

    Attributes:
        owner: this process, as the folder says.
        is_locked: whether the file system keeps others out.
    """

    path: Path
    owner: Owner
    is_locked: bool

    def check(self) -> None:
        """Find out that the folder was taken away, before something is written to where it was.

        Raises:
            UserError: it was removed or moved; or it was made anew, and is another process's now.
        """
        try:
            owner = Owner.model_validate_json((self.path / OWNER).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if not self.is_locked and self.path.is_dir():
                return  # another process, which nothing kept out, has ended here and taken its note away
            raise UserError(
                f"{self.path}: was removed or moved while it was being written; what is not there any more is lost, "
                f"and what was moved goes on from where it is now"
            ) from None
        except (OSError, ValueError):
            return  # it cannot be told; writing will
        if self.is_locked and owner != self.owner:
            raise UserError(f"{self.path}: was made anew by another process ({owner}), and is not written to any more")


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[HeldFolder]:
    """Hold a folder for the block, which is made if it is not there and removed again if nothing was put into it.

    What a killed process left half-written there is removed.

    The lock goes with its process, however that ends. Where the file system has no locks, a file that is touched every
    ten seconds stands in for it; then a warning tells of another process that seems to be at work, but nothing keeps
    it out.

    Raises:
        UserError: another process holds it, or it cannot be made or written to.
    """
    is_new, is_locked = not folder.exists(), True
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder}: another process is at work there ({_read_owner(folder) or 'it has not said which'}); wait "
                f"for its end or stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise UserError(f"cannot write {folder}: {reason(error)}; choose a writable folder") from error
            is_locked = False
            stack.enter_context(_signs_of_life(folder))
        else:
            stack.callback(lock.release)
            remove_temporaries(folder)
        if is_new:
            stack.callback(_remove_unused, folder)  # before the lock is given back: nobody else can have it then
        owner = _write_owner(folder)
        stack.callback(_forget_owner, folder)
        yield HeldFolder(folder, owner, is_locked)


@contextlib.contextmanager
def _signs_of_life(folder: Path) -> Iterator[None]:
    """Touch the owner's file while the block runs, after a look at whether another process does."""
    owner, silent = _read_owner(folder), _silence(folder)
    if owner is not None and silent < SILENCE and not owner.is_dead() and owner.pid != os.getpid():
        log.warning(
            "%s is on a file system that cannot lock, and another process seems to be at work there (%s, last heard of "
            "%.0f s ago); stop one of the two, or they overwrite each other's files",
            *(folder, owner, silent),
        )
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(folder / OWNER)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _silence(folder: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system, which may be another computer's."""
    clock = folder / f"{OWNER}.{os.getpid()}"
    try:
        clock.touch()
        return clock.stat().st_mtime - (folder / OWNER).stat().st_mtime
    except OSError:
        return float("inf")
    finally:
        with contextlib.suppress(OSError):
            clock.unlink()


def _read_owner(folder: Path) -> Owner | None:
    try:
        return Owner.model_validate_json((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None


def _write_owner(folder: Path) -> Owner:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    owner = Owner(pid=os.getpid(), host=socket.gethostname(), since=since)
    write_text_atomically(folder / OWNER, owner.model_dump_json() + "\n")
    return owner


def _forget_owner(folder: Path) -> None:
    owner = _read_owner(folder)
    if owner is not None and owner.pid == os.getpid():
        with contextlib.suppress(OSError):
            (folder / OWNER).unlink()


def _remove_unused(folder: Path) -> None:
    """Remove a folder in which there is nothing but the lock."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        folder.rmdir()
