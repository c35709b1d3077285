"""What every command does with errors that nobody expected of a disk, and with signals: one line, and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from dgpo_plugin.commands.terminal import OUT_OF_MEMORY, STOPPED, reports_user_errors
from dgpo_plugin.training.signals import as_interrupts, stop_signals

pytestmark = pytest.mark.fast


def raising(error: BaseException) -> click.Command:
    @click.command()
    @reports_user_errors
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/data/x"), "error: /data/x: Input/output error; see to its disk"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: a: Permission denied; see to its disk"),
        (OSError("cannot identify"), "error: a file or a stream: OSError: cannot identify; see to its disk"),
    ],
)
def test_whatever_a_disk_answers_is_one_line(error: OSError, said: str) -> None:
    ended = CliRunner().invoke(raising(error))
    assert ended.exit_code == 2
    assert ended.stderr.splitlines() == [said]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_ran_out_is_no_disk(error: Exception) -> None:
    ended = CliRunner().invoke(raising(error))
    assert (ended.exit_code, ended.stderr) == (2, f"error: {OUT_OF_MEMORY}\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_command_that_a_signal_ended_in_order_says_so(name: str) -> None:
    code = 128 + getattr(signal, name)
    ended = CliRunner().invoke(raising(SystemExit(code)))
    assert (ended.exit_code, ended.stderr) == (code, STOPPED + "\n")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_other_exits_say_nothing_more(code: int) -> None:
    ended = CliRunner().invoke(raising(SystemExit(code)))
    assert (ended.exit_code, ended.stderr) == (code, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_one_line() -> None:
    command = [sys.executable, "-m", "dgpo_plugin", "list", "algorithms"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: a file or a stream: No space left on device; see to its disk"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_while_a_run_loads_is_as_ctrl_c(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), as_interrupts():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_interrupts_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launchers_sigterm_after_ctrl_c_cuts_nothing_off() -> None:
    quiet = Console(quiet=True)
    before = signal.getsignal(signal.SIGTERM)
    with as_interrupts():
        with stop_signals(quiet) as received:
            signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)  # while the adapter is written
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    with as_interrupts():
        with stop_signals(quiet):
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_comes_while_an_object_is_destroyed_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Python prints what a destructor raises and goes on, so that the run would go on too."""

    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # where the handler is called

    def waits(seconds: float) -> None:
        Destroyed()
        time.sleep(seconds)

    with pytest.raises(KeyboardInterrupt), as_interrupts():
        waits(60)
    with as_interrupts():  # all is over before it comes again
        waits(0)
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
