"""Texts that a prompt puts in quotes, whichever language's they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

STRAIGHT = '"'
DOUBLE = {
    "“": ("”", "“", '"'),
    "”": ("”", '"'),
    "„": ("“”", '"'),
    "«": ("»",),
    "»": ("«»",),
    "「": ("」",),
    "『": ("』",),
    "《": ("》",),
    "〈": ("〉",),
}
"""What opens a quote, and what closes it: any mark of the first group that does, else of the next."""
SINGLE = {"‘": ("’", "'"), "‚": ("‘’", "'"), "‹": ("›",), "›": ("‹›",)}
WEAK = {"'": ("'", "’´"), "’": ("’",), "`": ("`", "'´")}
"""Marks that are more often apostrophes or code: they are looked at where no other quote stands."""
CLOSING = {STRAIGHT: (STRAIGHT, "”"), **DOUBLE, **SINGLE, **WEAK}
SHAPES = str.maketrans("″‟＂〝〞❝❞＇❛❜｢｣﹁﹂﹃﹄", '"“"””“”\'‘’「」「」『』')
"""The same marks in other Unicode."""
ESCAPED = re.compile(r"\\(?=[\"'])")
"""The backslash before a quote that was copied out of JSON or a program."""
SPACED_SCRIPTS_END = 0x2E80
"""Characters from here on (Chinese, Japanese, Korean) stand beside quotes without a space."""


def quoted_texts(text: str) -> tuple[str, ...]:
    """All texts in quotes, in their order; of quotes in quotes the outer ones.

    An apostrophe opens and closes nothing, nor does the mark of inches or feet: ``12"``, ``6'``.
    """
    text = ESCAPED.sub("", text)
    return tuple(inner for _, _, inner in _all_spans(text.translate(SHAPES), text))


def first_quoted(text: str) -> str:
    """The text in quotes that Flow-GRPO's reward takes, empty if there is none.

    That is the first between straight double quotes (``prompt.split('"')[1]`` in its flow_grpo/ocr.py). Where there is
    none, it is the first in any other double quotes, else in single ones.
    """
    text = ESCAPED.sub("", text)
    shape = text.translate(SHAPES)
    straight = next(_spans(shape, text, lambda mark: mark == STRAIGHT), None)
    if straight:
        return straight[2]
    spans = list(_all_spans(shape, text))
    double = [inner for start, _, inner in spans if shape[start] in DOUBLE]
    return next(iter(double or [inner for _, _, inner in spans]), "")


Span = tuple[int, int, str]
"""Where a quote opens, where it closes, and what stands in it."""


def _all_spans(shape: str, text: str) -> list[Span]:
    strong = list(_spans(shape, text, lambda mark: mark == STRAIGHT or mark in DOUBLE or mark in SINGLE))
    gaps = list(shape)
    for start, end, _ in strong:
        gaps[start : end + 1] = "\0" * (end + 1 - start)
    weak = [span for span in _spans("".join(gaps), text, WEAK.__contains__) if "\0" not in gaps[span[0] : span[1]]]
    return sorted([*strong, *weak])


def _spans(shape: str, text: str, opens: Callable[[str], bool]) -> Iterator[Span]:
    """Quotes whose opening mark is one of those, one after the other."""
    at = 0
    while at < len(shape):
        if opens(shape[at]) and _may_open(shape, at) and (end := _end(shape, at)):
            inner = text[at + 1 : end].strip()
            if shape[at] in WEAK:  # ''wiki'' and ``TeX'' write each mark twice
                inner = inner.strip("'`")
            if inner:
                yield at, end, inner
            at = end
        at += 1


def _end(shape: str, start: int) -> int:
    """Where the quote that opens at a place closes; 0 if it does not."""
    mark = shape[start]
    for closing in CLOSING[mark]:
        depth = 1
        for at in range(start + 1, len(shape)):
            if shape[at] in closing and _may_close(shape, at, closing):
                depth -= 1
                if depth == 0:
                    return at
            elif shape[at] == mark and mark not in closing:
                depth += 1
    return 0


def _may_open(shape: str, at: int) -> bool:
    before, after = shape[at - 1 : at], shape[at + 1 : at + 2]
    if shape[at] == STRAIGHT:
        return not _is_number(before)  # 12" is a measure
    if shape[at] in "“„«「『《〈":
        return True
    return not _in_word(before) and not after.isspace() and _lone_n(shape, at)


def _may_close(shape: str, at: int, closing: str) -> bool:
    before, after = shape[at - 1], shape[at + 1 : at + 2]
    if shape[at] in "'’´`‘“":
        rock_n_roll = before in "nN" and shape[max(at - 2, 0) : at - 1] in tuple("'’") and after.isspace()
        return not before.isspace() and not _in_word(after) and not rock_n_roll
    return not (_is_number(before) and shape[at] in '"”' and _closes_later(shape, at, closing))


def _closes_later(shape: str, at: int, closing: str) -> bool:
    """Whether the quote goes on behind a mark that may mean inches: another one closes it before the next one opens."""
    for later in range(at + 1, len(shape)):
        if shape[later] in closing or shape[later] == STRAIGHT:
            before, after = shape[later - 1], shape[later + 1 : later + 2]
            if _is_number(before):
                continue
            return not before.isspace() and not _in_word(after)
        if shape[later] in DOUBLE:
            return False
    return False


def _lone_n(shape: str, at: int) -> bool:
    """False for the apostrophes of rock 'n' roll."""
    return shape[at + 1 : at + 3].lower() not in ("n'", "n’")


def _in_word(character: str) -> bool:
    return character.isalnum() and ord(character) < SPACED_SCRIPTS_END


def _is_number(character: str) -> bool:
    return character.isnumeric() and ord(character) < SPACED_SCRIPTS_END
