"""How near the text that was read is to the one asked for: Flow-GRPO's rule, and ours, which forgives what looks alike.

The distance of both is Flow-GRPO's (flow_grpo/ocr.py): 0 where the text asked for stands whole in what was read,
whatever else is there; else the edit distance to all of what was read, at most the length.
"""

from __future__ import annotations

import functools
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

Same = Callable[[str, str], bool]
FORGIVING_VERSION = 1
"""Of the forgiving rule: another number, another reward."""
QUOTES = '“”„‟«»″‶〝〞〟❝❞ʺ"‘’‚‛‹›′‵´`ʹʻʼʽˈ❛❜'
DASHES = "‐‑‒–—―−⁃─━﹣"
OTHERS = {
    "°": "º˚∘◦",
    "·": "•∙⋅・●‧▪",
    "x": "×✕✖⨯╳",
    "I": "İ",
    ":": "∶ː",
    "/": "⁄∕",
    "|": "∣│❘",
    "~": "〜∼˜",
    ".": "。",
    ",": "、",
    "[": "【〔〖",
    "]": "】〕〗",
    "<": "〈",
    ">": "〉",
}
ALIKE = {ord(drawn): plain for plain, many in {"'": QUOTES, "-": DASHES, **OTHERS}.items() for drawn in many}
"""Characters that are drawn the same, or nearly, and what they are taken for."""
SPELLED = (("ß", "ss"), ("ẞ", "SS"), ("æ", "ae"), ("Æ", "AE"), ("œ", "oe"), ("Œ", "OE"), ("n°", "no"), ("N°", "No"))
"""Letters, and № or Nº, that are read as two."""
STROKES = str.maketrans("ıøłđħŧ", "ioldht")
"""Letters whose mark Unicode does not take for one."""
SAME_SHAPES = ("Il1|", "Oo0")
"""What a font without serifs draws alike; a small i, which has its dot, is none of them."""


def published_closeness(read: str, wanted: Sequence[str]) -> float:
    """Flow-GRPO's rule: spaces and case do not count, everything else does."""
    return _closeness(_spaceless(read), [_spaceless(text) for text in wanted], operator.eq)


def forgiving_closeness(read: str, wanted: Sequence[str]) -> float:
    """The rule that a plainly drawn text fulfils: it forgives what a reader cannot tell, or makes up.

    Spaces and case do not count, nor do quotes round the whole text. What looks alike (:func:`alike`, I, l and 1, O and
    0) may be taken for each other. A letter may be read with a mark that the text asked for does not have there
    ("Sérénity"); one that it does have must be read ("cafe" is not "café").
    """
    return _closeness(alike(read), [_unquoted(alike(text)) for text in wanted], _same_letter)


def forgiving_exact(read: str, wanted: Sequence[str]) -> bool:
    """Whether what was read is what was asked for and nothing else, by :func:`forgiving_closeness`'s rule.

    Quotes round all that was read do not count either; of several texts each may stand anywhere.
    """
    text, texts = _unquoted(alike(read)), [_unquoted(alike(each)) for each in wanted]
    return len(text) == sum(map(len, texts)) and _closeness(text, texts, _same_letter) == 1


def alike(text: str) -> str:
    """A text without spaces and what is no letter or sign, and of characters that look alike always the same one."""
    # Before NFKC, which takes ´ and ˚ for a space with a mark, º for an o.
    text = unicodedata.normalize("NFKC", text.translate(ALIKE)).translate(ALIKE)
    text = "".join(character for character in text if not character.isspace() and not _is_ornament(character))
    for letter, spelled in SPELLED:
        text = text.replace(letter, spelled)
    return re.sub("(['°-])+", r"\1", text)


def edit_distance(a: Sequence[str], b: Sequence[str], same: Same = operator.eq) -> int:
    """Insertions, deletions and substitutions that make one text the other (Levenshtein).

    Args:
        same: whether a character of the first may stand for one of the second.
    """
    if same is operator.eq:
        return Levenshtein.distance(a, b)
    row = list(range(len(b) + 1))
    for taken, one in enumerate(a, 1):
        diagonal, row[0] = row[0], taken
        for at, other in enumerate(b, 1):
            diagonal, row[at] = row[at], min(diagonal + (not same(one, other)), row[at] + 1, row[at - 1] + 1)
    return row[-1]


def _closeness(read: str, wanted: Sequence[str], same: Same) -> float:
    """1 - distance / length in [0, 1]; of several texts those that stand whole are taken out, and the rest compared."""
    missing = list(wanted)
    for text in sorted(wanted, key=len, reverse=True):
        at = _find(read, text, same)
        if at >= 0:
            read = read[:at] + read[at + len(text) :]
            missing.remove(text)
    rest = "".join(missing)
    return 1 - min(edit_distance(read, rest, same), len(rest)) / len("".join(wanted)) if rest else 1.0


def _find(read: str, text: str, same: Same) -> int:
    """Where a text stands in what was read, -1 if it does not."""
    starts = range(len(read) - len(text) + 1)
    return next((at for at in starts if all(map(same, read[at : at + len(text)], text))), -1)


@functools.cache
def _same_letter(read: str, wanted: str) -> bool:
    """Whether a letter that was read may stand for a wanted one."""
    if read == wanted or any(read in shapes and wanted in shapes for shapes in SAME_SHAPES):
        return True
    return wanted.casefold() in (read.casefold(), _base(read).casefold())


@functools.cache
def _base(letter: str) -> str:
    """A Latin or Greek letter without its marks; in other scripts (Hangul, kana) these are part of the letter."""
    base = unicodedata.normalize("NFD", letter)[0].translate(STROKES)
    return base if base.isascii() or "Α" <= base <= "ω" else letter


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    return inner if inner and text == f"'{inner}'" else text


def _is_ornament(character: str) -> bool:
    """Hearts, stars and emoji, which a reader passes over as often as not; what is not drawn; Spanish ¿ and ¡."""
    kind = unicodedata.category(character)
    return character in "¿¡" or kind == "Cf" or (kind == "So" and character >= "■") or "\ufe00" <= character <= "\ufe0f"


def _spaceless(text: str) -> str:
    return text.replace(" ", "").lower()
