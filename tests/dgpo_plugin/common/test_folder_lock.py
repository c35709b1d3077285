"""One process at a time in a folder, on file systems with locks and without."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dgpo_plugin.common import folder_lock
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.folder_lock import LOCK, OWNER, Owner, only_process

pytestmark = pytest.mark.fast

HOLDER = """
import sys
from pathlib import Path
from dgpo_plugin.common.folder_lock import only_process
with only_process(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that is at work in a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        since = Owner.model_validate_json((tmp_path / "run" / OWNER).read_text()).since
        with pytest.raises(UserError) as refused, only_process(tmp_path / "run"):
            pass
        assert str(refused.value) == (
            f"{tmp_path}/run: another process is at work there (process {process.pid} on {socket.gethostname()}, "
            f"since {since}); wait for its end or stop it, or choose another folder"
        )
        assert (tmp_path / "run").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "run" / OWNER).exists()  # a stale note is no lock
    with only_process(tmp_path / "run"):
        assert Owner.model_validate_json((tmp_path / "run" / OWNER).read_text()).pid == os.getpid()


def test_two_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    """As two training nodes of one server."""
    problems: list[str] = []

    def second() -> None:
        try:
            with only_process(tmp_path):
                pass
        except UserError as error:
            problems.append(str(error))

    with only_process(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(problems) == 1
    with only_process(tmp_path):
        pass


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before anything"), only_process(tmp_path / "new"):
        raise ValueError("before anything was written")
    assert not (tmp_path / "new").exists()
    (tmp_path / "own").mkdir()
    with only_process(tmp_path / "own"):
        pass
    assert (tmp_path / "own").exists()
    with only_process(tmp_path / "used"):
        (tmp_path / "used" / "config.yaml").touch()
    assert sorted(os.listdir(tmp_path / "used")) == [LOCK, "config.yaml"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with pytest.raises(UserError, match="cannot write .*file/run: Not a directory"), only_process(folder):
        pass


@pytest.fixture(params=[errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that answers as CIFS, NFS without its daemon and some FUSE do."""
    import fcntl

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("pid", "host", "age", "is_told"),
    [
        (1, "elsewhere", 5, True),  # another computer's, heard of just now
        (1, "elsewhere", 3600, False),
        (1, None, 5, True),  # this computer's, alive
        (2**22 + 1, None, 5, False),  # no such process here: killed
        (None, None, 5, False),  # our own
    ],
)
def test_without_locks_a_living_process_is_told_of(
    pid: int | None, host: str | None, age: int, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(pid=pid or os.getpid(), host=host or socket.gethostname(), since="2026-11-26 10:00:00+00:00")
    (tmp_path / OWNER).write_text(owner.model_dump_json())
    when = (tmp_path / OWNER).stat().st_mtime - age
    os.utime(tmp_path / OWNER, (when, when))
    with caplog.at_level(logging.WARNING), only_process(tmp_path):
        pass
    assert len(caplog.messages) == is_told
    for line in caplog.messages:
        assert "cannot lock" in line
        assert str(owner) in line
        assert len(line.splitlines()) == 1


@pytest.mark.usefixtures("no_locks")
def test_without_locks_there_are_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched, utime = threading.Event(), os.utime

    def note(path: Path, *times: Any) -> None:
        utime(path, *times)
        if path.name == OWNER:
            touched.set()

    monkeypatch.setattr(folder_lock, "HEARTBEAT", 0.01)
    monkeypatch.setattr(os, "utime", note)
    with only_process(tmp_path):
        assert touched.wait(60)
    assert not (tmp_path / OWNER).exists()
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_folder_that_was_taken_away_is_found_out(tmp_path: Path) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    with only_process(folder) as held:
        held.check()
        folder.rename(away)
        with pytest.raises(UserError, match=r"run: was removed or moved while it was being written; .* goes on from"):
            held.check()
        away.rename(folder)
        held.check()
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="was removed or moved"):
            held.check()
        with only_process(folder):
            (folder / OWNER).write_text(Owner(pid=1, host="elsewhere", since="now").model_dump_json())
            with pytest.raises(UserError, match="was made anew by another process"):
                held.check()


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / f".{OWNER}.4711.tmp.json").touch()
    (tmp_path / "config.yaml").touch()
    with only_process(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [LOCK, OWNER, "config.yaml"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_folder_is_lost_only_when_it_is_gone(tmp_path: Path) -> None:
    with only_process(tmp_path / "run") as held:
        with only_process(tmp_path / "run"):
            held.check()
        held.check()
        (tmp_path / "run").rename(tmp_path / "away")
        with pytest.raises(UserError, match="was removed or moved"):
            held.check()
