"""The one exception that means "the user can mend this", and the hint that goes with a mistyped name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """Bad input. Its text is one line that says what is wrong, where, and what to do.

    The command lines print it without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """A run was told to stop, and did, with everything saved; the message says how to go on."""


class StopNow(Exception):
    """Raised inside an iteration, by whoever watches a run, to end it there; what was done before it is saved."""


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin each user error from inside with ``where: ``: who raises it knows the fact, who calls knows whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def in_one_line(error: BaseException) -> str:
    """An error of other people's code: its class and the first line of what it says, cut to a line's length."""
    try:
        said = str(error)
    except Exception:  # their __str__ may fail too
        said = "its message cannot be read"
    return f"{type(error).__name__}: {(said.splitlines() or [''])[0][:300]}"


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``; did you mean 'x'?`` for a near name, else ``; known: a, b``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
