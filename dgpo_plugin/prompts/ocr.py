"""Prompts that ask for rendered words, which stand in double quotes and under ``text``.

No word that is tested is ever trained on, the tails apart. They stand in for Flow-GRPO's lists (dataset/ocr: about
20,000 training prompts and 1,018 of test, scenes with a quoted text each), which are not shipped and load as they are.
"""

from __future__ import annotations

import itertools

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.split import held_out_keys, shuffled_by_hash
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
TEST_SHARE = 0.15
TRAIN, TEST = 2000, 200


def train_prompts() -> list[Prompt]:
    """The training set, 2,000 prompts."""
    return _prompts(test=False, limit=TRAIN)


def held_out_prompts() -> list[Prompt]:
    """The test set: 200 prompts whose words are in no training prompt (the tails apart)."""
    return _prompts(test=True, limit=TEST)


def _prompts(*, test: bool, limit: int) -> list[Prompt]:
    held_out = held_out_keys([*FIRST, *SECOND], TEST_SHARE)
    first, second = ([word for word in words if (word in held_out) == test] for words in (FIRST, SECOND))
    pairs = [f"{a} {b}" for a, b in itertools.product(first, second)]
    texts = [*first, *second, *pairs, *(f"{pair} {tail}" for pair, tail in itertools.product(pairs, TAILS))]
    prompts = [Prompt(place.format(text), {"text": text}) for place, text in itertools.product(PLACES, texts)]
    return shuffled_by_hash(prompts, lambda prompt: prompt.text)[:limit]
