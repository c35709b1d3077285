"""The one exception that means "the user can mend this", and how errors and mistyped names are put into words."""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 3600
"""Of an error's message in UTF-8: it may quote a file, a key or a value of any length."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do.

    Whatever it quotes, it is one line of at most :data:`MOST_BYTES`: control characters are written out, and too long a
    message loses its middle, for its ends say where and what to do. The command lines print it without a traceback and
    exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut_in_the_middle(printable(message), MOST_BYTES))


def printable(text: str) -> str:
    """A text with everything written out that is no letter or sign: line ends, control characters, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def is_unicode(text: str) -> bool:
    """Whether a text is of whole characters; a lone surrogate is half of one, which no file can keep."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def cut_in_the_middle(text: str, most: int) -> str:
    """A text of at most so many bytes in UTF-8; of a longer one the beginning and the end, three dots between them."""
    whole = text.encode("utf-8", "surrogatepass")
    if len(whole) <= most:
        return text
    half = (most - len(_CUT)) // 2
    return whole[:half].decode("utf-8", "ignore") + _CUT + whole[-half:].decode("utf-8", "ignore")


_CUT = " ... "


class Stopped(Exception):
    """A run was told to stop, and did, with everything saved; the message says how to go on."""


class StopNow(Exception):
    """The end of a run, raised inside an iteration by whoever watches it; what was done before that is saved."""


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin each user error from inside with ``where: ``: who raises it knows the fact, who calls knows whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def in_one_line(error: BaseException) -> str:
    """An error of other people's code in one line: its class and the first line of what it says, cut to length."""
    try:
        said = str(error)
    except BaseException as unreadable:  # their __str__ may fail too
        if isinstance(unreadable, KeyboardInterrupt):
            raise
        said = "its message cannot be read"
    return f"{type(error).__name__}: {(said.splitlines() or [''])[0][:300]}"


MOST_PROBLEMS = 5
"""Of many problems of a kind, that are told one by one."""


def first_few(problems: Sequence[str], what: str, total: int = 0, others: Sequence[str] = ()) -> str:
    """Problems of a kind in one line: the first few, and how many more there are, ``; and 3 more (prompts.txt:6-8)``.

    Args:
        what: more of what, in the plural.
        total: how many there are in all, where not all are given.
        others: where those are that are only counted, as ``file:line``.
    """
    more = max(total, len(problems)) - len(problems[:MOST_PROBLEMS])
    where = f" ({in_ranges(others)})" if others else ""
    return "; ".join([*problems[:MOST_PROBLEMS], *([f"and {more} more {what}{where}"] if more > 0 else [])])


def in_ranges(places: Sequence[str]) -> str:
    """Places, as ``file:line``, in short: ``a.txt:6-8, 10, b.txt:3``."""
    told: list[str] = []
    before = ("", 0, 0)  # the file, and the first and the last line of the range
    for place in places:
        file, _, line = place.rpartition(":")
        number = int(line) if line.isdecimal() else 0
        if number and file == before[0] and number == before[2] + 1:
            before = (file, before[1], number)
            told[-1] = f"{told[-1].removesuffix(f'-{number - 1}')}-{number}"
        else:
            told.append(line if number and file == before[0] else place)
            before = (file, number, number)
    return ", ".join(told)


def resume_command(run: Path) -> str:
    """What goes on with a run, as it is typed in a shell: its folder's name may have spaces."""
    return f"dgpo resume {shlex.quote(str(run))}"


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """How an error about an unknown name ends: ``; did you mean 'x'?`` if one is near, else ``; known: a, b``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
