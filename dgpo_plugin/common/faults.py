"""A process that died without a word of Python: by what, what that most likely means, and what to do."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import subprocess
import sys
from collections.abc import Iterator

REFUSED = (
    "the processor refused an instruction that it announces; set the precision to fp32, or the environment variable "
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
)
MEANINGS = {
    "SIGILL": REFUSED,
    "SIGKILL": "most likely the memory ran out; do less at once",
    "SIGSEGV": "a fault inside a library, not in Python",
    "SIGBUS": "a fault inside a library, or a full shared memory",
    "SIGABRT": "a library gave up; what it said is above",
    "SIGTERM": "something told it to end",
}
WINDOWS = {0xC000001D: "SIGILL", 0xC0000005: "SIGSEGV", 0xC0000409: "SIGABRT"}
"""Exit codes that say there what a signal says elsewhere."""


def signal_name(code: int) -> str | None:
    """The signal that ended a process, from its exit code (negative for a signal, as subprocess has it), if one did."""
    if code % 2**32 in WINDOWS and abs(code) > 2**16:
        return WINDOWS[code % 2**32]
    if code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def how_it_ended(code: int) -> str:
    """How a process ended, as the end of a sentence: by which signal or exit code, and what that most likely means."""
    name = signal_name(code)
    if name is None:
        return f"ended with exit code {code}"
    return f"was ended by {name}" + (f" ({MEANINGS[name]})" if name in MEANINGS else "")


# Reads what faulthandler says, which is nothing unless the process dies, and adds what it means.
_READER = """
import sys
said = sys.stdin.buffer.read().decode("utf-8", "replace")
if said:
    refused = "Illegal instruction" in said or "0xc000001d" in said
    sys.stderr.write(said + "error: " + sys.argv[1 if refused else 2] + "\\n")
"""


@contextlib.contextmanager
def explained(go_on: str) -> Iterator[None]:
    """Say more than "Illegal instruction" if the process dies in the block, in whichever of its threads.

    Python's faulthandler writes where it happened, from inside the dying process, into a pipe; a small process at the
    other end passes that on to standard error and adds a line. It says nothing if nothing was written: after a normal
    end, and after a kill that nobody can catch. Does nothing where a faulthandler is at work already.

    Args:
        go_on: the end of that line, what to do next.
    """
    if faulthandler.is_enabled():
        yield
        return
    lines = [f"{REFUSED}; then {go_on}", f"a fault inside a library, not in Python; {go_on}"]
    try:
        # In a session of its own, or a Ctrl-C would end it before the process that it listens to.
        reader = subprocess.Popen(  # noqa: S603
            [sys.executable, "-S", "-E", "-c", _READER, *lines], stdin=subprocess.PIPE, start_new_session=True
        )
    except OSError:
        yield
        return
    assert reader.stdin is not None
    faulthandler.enable(reader.stdin)
    try:
        yield
    finally:
        faulthandler.disable()
        # On Windows it also writes about faults that a library has caught: no news of a process that ends well.
        reader.kill()
        reader.communicate()
