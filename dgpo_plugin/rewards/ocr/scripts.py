"""Which scripts are read with which ``lang``, and what is said of characters that are not."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence, Set

from dgpo_plugin.rewards.ocr.matching import alike

DEFAULT_SCRIPTS = "Latin, Chinese and Japanese"
"""What the model in rapidocr's package reads; it knows Greek letters, but not their accents."""
LANGS = {
    "HANGUL": "korean",
    "CYRILLIC": "eslav",
    "GREEK": "el",
    "ARABIC": "arabic",
    "THAI": "th",
    "DEVANAGARI": "devanagari",
    "TAMIL": "ta",
    "TELUGU": "te",
}
"""By the first word of a character's name in Unicode: the lang that reads its script."""


def unread(texts: Sequence[str], readable: Set[str], lang: str) -> str:
    """What is said of texts with characters that a model does not know, empty if it knows them all.

    Args:
        readable: its characters, as :func:`~dgpo_plugin.rewards.ocr.matching.alike` makes them.
    """
    asked = dict.fromkeys(alike("".join(texts)))
    unknown = [character for character in asked if not {character, character.casefold()} & readable]
    if not unknown:
        return ""
    reads = f"lang {lang}" if lang else f"the model in rapidocr's package (it reads {DEFAULT_SCRIPTS})"
    script = unicodedata.name(unknown[0], "").split(" ")[0]
    other = LANGS.get(script, "")
    cure = f"set options.lang: {other}" if other not in ("", lang) else "ask for other words"
    return f"of which {reads} cannot read {' '.join(unknown)}; {cure}"
