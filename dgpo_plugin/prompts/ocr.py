"""Prompts that ask for rendered words, which stand in double quotes and under ``text``.

No word that is tested or validated on is ever trained on, the tails apart. They stand in for Flow-GRPO's lists
(dataset/ocr: about 20,000 training prompts and 1,018 of test, scenes with a quoted text each), which are not shipped:
``flow-grpo/ocr-train`` and ``flow-grpo/ocr-test`` fetch them.
"""

from __future__ import annotations

import itertools
from collections.abc import Set

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.split import shuffled_by_hash, split_keys
from dgpo_plugin.prompts.words import read_words

PLACES = (
    'A wooden shop sign that reads "{}"',
    'A neon sign in a dark street, glowing with the words "{}"',
    'A chalkboard outside a café with "{}" written on it',
    'A book cover with the title "{}"',
    'A birthday cake with "{}" written in icing',
    'A white T-shirt printed with "{}"',
    'A road sign at a crossing that says "{}"',
    'A poster on a brick wall with "{}" in bold letters',
    'A coffee mug with the words "{}" on its side',
    'A billboard by the motorway showing "{}"',
    'A train ticket stamped "{}"',
    'A newspaper with the headline "{}"',
    'A label on a glass jar that says "{}"',
    'A banner over a market stall with the words "{}"',
    'Graffiti on a concrete wall spelling "{}"',
    'A postcard of a harbour with "{}" across the top',
)
FIRST = read_words("ocr_first.txt")
SECOND = read_words("ocr_second.txt")
TAILS = ("Today", "Tonight", "Since 1924", "Closed Monday", "Half Price", "Welcome", "Sold Out")
TEST_SHARE = VALIDATION_SHARE = 0.15
"""Of the words."""
TRAIN, TEST = 2000, 200


def train_prompts() -> list[Prompt]:
    """The training set, 2,000 prompts."""
    tested, validated = _split()
    return _prompts({*FIRST, *SECOND} - tested - validated, TRAIN)


def held_out_prompts() -> list[Prompt]:
    """The test set: 200 prompts whose words are in no other set (the tails apart)."""
    return _prompts(_split()[0], TEST)


def validation_prompts() -> list[Prompt]:
    """The set for choosing settings: 200 prompts whose words are in no other set (the tails apart)."""
    return _prompts(_split()[1], TEST)


def _split() -> list[frozenset[str]]:
    """The words that are tested and those that are validated on."""
    return split_keys([*FIRST, *SECOND], TEST_SHARE, VALIDATION_SHARE)


def _prompts(own: Set[str], limit: int) -> list[Prompt]:
    """Prompts of a set's own words."""
    first, second = ([word for word in words if word in own] for words in (FIRST, SECOND))
    pairs = [f"{a} {b}" for a, b in itertools.product(first, second)]
    texts = [*first, *second, *pairs, *(f"{pair} {tail}" for pair, tail in itertools.product(pairs, TAILS))]
    prompts = [Prompt(place.format(text), {"text": text}) for place, text in itertools.product(PLACES, texts)]
    return shuffled_by_hash(prompts, lambda prompt: prompt.text)[:limit]
