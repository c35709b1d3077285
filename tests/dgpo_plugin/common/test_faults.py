"""A process that dies of a signal says what it means; one that ends says nothing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from dgpo_plugin.common.faults import how_it_ended, signal_name

pytestmark = pytest.mark.fast

SETUP = """
import ctypes, faulthandler, os, resource, signal, sys, threading, time
from dgpo_plugin.common.faults import explained
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def native(number):
    # In a thread that Python knows nothing of, as OpenMP's are.
    libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
    start = ctypes.cast(getattr(libc, "raise"), ctypes.c_void_p)
    libc.pthread_create(ctypes.byref(thread), None, start, ctypes.c_void_p(number))
    time.sleep(60)

def fault(number):
    os.kill(os.getpid(), number)
    time.sleep(60)

with explained("go on with: dgpo resume runs/mine"):
"""


def dying(*steps: str) -> subprocess.CompletedProcess[str]:
    script = SETUP + "".join(f"    {step}\n" for step in steps)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, start_new_session=True
    )


@pytest.mark.parametrize("step", ["fault(signal.SIGILL)", "native(signal.SIGILL)"])
def test_an_illegal_instruction_is_explained(step: str) -> None:
    done = dying(step)
    assert done.returncode == -signal.SIGILL
    assert "Illegal instruction" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the processor refused an instruction that it announces; set the precision to fp32")
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16; then go on with: dgpo resume runs/mine" in last


def test_another_fault_is_not_laid_to_the_processor() -> None:
    done = dying("native(signal.SIGSEGV)")
    assert done.returncode == -signal.SIGSEGV
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: a fault inside a library, not in Python; go on with: dgpo resume runs/mine"


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        (["pass"], 0),
        (["sys.exit(3)"], 3),
        (["fault(signal.SIGKILL)"], -signal.SIGKILL),
        (["fault(signal.SIGTERM)"], -signal.SIGTERM),
        (["os._exit(0)"], 0),
    ],
)
def test_any_other_end_is_silent(steps: list[str], code: int) -> None:
    done = dying(*steps)
    assert done.returncode == code
    assert done.stderr == ""


def test_a_ctrl_c_before_it_does_not_take_the_explanation_away() -> None:
    """A terminal sends it to every process of the group, a run goes on to the end of its iteration."""
    done = dying("signal.signal(signal.SIGINT, signal.SIG_IGN)", "os.killpg(0, signal.SIGINT)", "fault(signal.SIGILL)")
    assert "dgpo resume runs/mine" in done.stderr


def test_a_faulthandler_of_the_users_own_is_left_alone() -> None:
    script = SETUP.replace("with explained", "faulthandler.enable()\nwith explained") + "    fault(signal.SIGILL)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "Illegal instruction" in done.stderr
    assert "dgpo resume" not in done.stderr


@pytest.mark.parametrize("command", ["train", "resume"])
def test_the_commands_explain_it(command: str) -> None:
    script = f"""
import os, resource, signal
from dgpo_plugin.commands import main as cli; from dgpo_plugin.training import run
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
run.train = run.resume = lambda *_, **__: os.kill(os.getpid(), signal.SIGILL)
cli.main({["train", "shapes", "--output", "out/run"] if command == "train" else ["resume", "out/run"]})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGILL
    assert done.stderr.strip().endswith("go on with: dgpo resume out/run")


def test_an_exit_code_is_told_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-signal.SIGKILL) == "was ended by SIGKILL (most likely the memory ran out; do less at once)"
    assert how_it_ended(-signal.SIGILL).startswith("was ended by SIGILL (the processor refused an instruction")
    assert how_it_ended(-250) == "was ended by signal 250"
    # Windows has no signals; a process's last word is a status.
    assert [signal_name(code) for code in (0xC000001D, 0xC000001D - 2**32, 1, 0)] == ["SIGILL", "SIGILL", None, None]
