"""What the words world can say: a word, a font and a ground, their prompts, and which words are held out.

A word is a consonant, a vowel and a consonant ("CAT", "WEX"). I, J, O and Q are left out, which the reader takes for
each other, for 1 and for 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.split import shuffled_by_hash

CONSONANTS = "BCDFGHKLMNPRSTVWXYZ"
VOWELS = "AEU"
LEFT_OUT = frozenset({"CUM", "FAG", "FUK", "KUM", "NAZ", "SEX"})
"""Words that nobody wants to see in a report."""
FONTS = ("sans", "serif", "mono", "oblique", "italic")
GROUNDS = ("plain", "striped", "checkered", "dotted")
COLORS = ("black", "blue", "green", "white", "yellow", "pink")
TRAINED_FONTS = ("sans", "serif")
"""The fonts that training with a reward sees; the others are out of its domain, as are all grounds but the plain."""
VALIDATION_WORDS = 120
HELD_OUT_WORDS = 240
OUT_OF_DOMAIN_WORDS = 240


def prompt(word: str, font: str, ground: str, color: str) -> Prompt:
    """The prompt for a word; its metadata are what it asks for, ``text``, ``font``, ``ground`` and ``color``."""
    metadata = {"text": word, "font": font, "ground": ground, "color": color}
    return Prompt(f'"{word}" in {font} on a {ground} {color} ground', metadata)


def train_prompts() -> list[Prompt]:
    """One prompt for each word that may be trained on, in the fonts and on the grounds that are trained on."""
    return _prompts(TRAIN, TRAINED_FONTS, ("plain",))


def validation_prompts() -> list[Prompt]:
    """Prompts of the kind that is trained on, of words that no other set has: for the choice of settings."""
    return _prompts(VALIDATION, TRAINED_FONTS, ("plain",))


def held_out_prompts() -> list[Prompt]:
    """Prompts of the kind that is trained on, of words that no other set has: for the final judgment."""
    return _prompts(HELD_OUT, TRAINED_FONTS, ("plain",))


def out_of_domain_prompts() -> list[Prompt]:
    """Words that no other set has, in another font, on another ground, or both: a third of the prompts each."""
    other_fonts, patterned = FONTS[len(TRAINED_FONTS) :], GROUNDS[1:]
    third = len(OUT_OF_DOMAIN) // 3
    return [
        *_prompts(OUT_OF_DOMAIN[:third], other_fonts, ("plain",)),
        *_prompts(OUT_OF_DOMAIN[third : 2 * third], TRAINED_FONTS, patterned),
        *_prompts(OUT_OF_DOMAIN[2 * third :], other_fonts, patterned),
    ]


def _prompts(words: Iterable[str], fonts: Sequence[str], grounds: Sequence[str]) -> list[Prompt]:
    """A prompt for each word: every font, ground and color in turn, each combination as often as any other."""
    kinds = [(font, ground, color) for color in COLORS for ground in grounds for font in fonts]
    return [prompt(word, *kinds[index % len(kinds)]) for index, word in enumerate(words)]


def _all_words() -> list[str]:
    words = [first + vowel + last for first in CONSONANTS for vowel in VOWELS for last in CONSONANTS]
    return shuffled_by_hash([word for word in words if word not in LEFT_OUT], str)


_WORDS = _all_words()
_ENDS = (VALIDATION_WORDS, VALIDATION_WORDS + HELD_OUT_WORDS, VALIDATION_WORDS + HELD_OUT_WORDS + OUT_OF_DOMAIN_WORDS)
VALIDATION, HELD_OUT, OUT_OF_DOMAIN = _WORDS[: _ENDS[0]], _WORDS[_ENDS[0] : _ENDS[1]], _WORDS[_ENDS[1] : _ENDS[2]]
TRAIN = _WORDS[_ENDS[2] :]
"""The words of pretraining and of training with a reward, 477 of the 1,077."""
