"""The rewards ocr and ocr-exact: how well the words that a prompt asks for are read in its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.quotes import first_quoted, quoted_texts
from dgpo_plugin.rewards.base import Reward, problems
from dgpo_plugin.rewards.ocr.matching import (
    FORGIVING_VERSION,
    alike,
    forgiving_closeness,
    forgiving_exact,
    published_closeness,
)
from dgpo_plugin.rewards.ocr.reader import reader_of
from dgpo_plugin.rewards.ocr.scripts import unread

Matching = Literal["forgiving", "published"]
Texts = Literal["published", "all"]


class OcrReward(Reward):
    """How well the words asked for are read: 1 - edit distance / length, in [0, 1], as in Flow-GRPO's reward.

    Where the words asked for stand whole in what is read, the distance is 0, whatever else is there. They come from
    ``metadata["text"]``, else from between the prompt's quotes.

    Args:
        matching: ``forgiving`` takes for the same what a reader cannot tell apart; ``published`` is Flow-GRPO's rule.
        texts: which of several quoted texts are asked for: the one that Flow-GRPO takes, or all of them, wherever they
            stand.
        lang: the language or script to read, by rapidocr's name; empty for the model in its package, which reads
            Latin, Chinese and Japanese.

    Raises:
        UserError: another matching, texts or lang.
    """

    def __init__(self, matching: Matching = "forgiving", texts: Texts = "published", lang: str = "") -> None:
        _known("matching", matching, get_args(Matching))
        _known("texts", texts, get_args(Texts))
        self._matching, self._texts, self._lang = matching, texts, lang
        self._reader = reader_of(lang)
        self._readable = frozenset(alike("".join(self._reader.characters)))
        rule = f"forgiving {FORGIVING_VERSION}" if matching == "forgiving" else "published"
        self.title = (
            ", ".join([f"ocr ({rule}", *(["all texts"] if texts == "all" else []), *([lang] if lang else [])]) + ")"
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        wanted = [self.requested(prompt) for prompt in prompts]
        return images.new_tensor([self._score(*pair) for pair in zip(images, wanted, strict=True)])

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, self.requested)

    def requested(self, prompt: Prompt) -> tuple[str, ...]:
        """The texts that a prompt asks for.

        Raises:
            UserError: it asks for none, or for characters that cannot be read.
        """
        texts = requested_texts(prompt, self._texts)
        if missing := unread(texts, self._readable, self._lang):
            raise UserError(f"prompt {prompt.text!r} asks for {' '.join(texts)!r}, {missing}")
        return texts

    def _score(self, image: Tensor, wanted: Sequence[str]) -> float:
        read = self._reader.read(image)
        if self._matching == "published":
            return published_closeness(read[0], wanted)
        return max(forgiving_closeness(order, wanted) for order in read)


class OcrExactReward(OcrReward):
    """Whether what is read is what is asked for, and nothing else: 0 or 1, by the forgiving rule of ``ocr``.

    Args:
        texts, lang: as of :class:`OcrReward`.

    Raises:
        UserError: another texts or lang.
    """

    def __init__(self, texts: Texts = "published", lang: str = "") -> None:
        super().__init__("forgiving", texts, lang)
        self.title = self.title.replace("ocr", "ocr-exact", 1)

    def _score(self, image: Tensor, wanted: Sequence[str]) -> float:
        return float(any(forgiving_exact(order, wanted) for order in self._reader.read(image)))


def requested_texts(prompt: Prompt, texts: Texts = "published") -> tuple[str, ...]:
    """The texts that a prompt asks for: at least one, with words in each.

    Raises:
        UserError: it asks for none.
    """
    given = prompt.metadata.get("text")
    if given is not None and not isinstance(given, str):
        raise UserError(f"prompt {prompt.text!r} has {given!r} as metadata text; write it as text, in quotes")
    found = (given,) if given else quoted_texts(prompt.text) if texts == "all" else (first_quoted(prompt.text),)
    words = tuple(" ".join(text.split()) for text in found if alike(text))
    if not words:
        raise UserError(f'prompt {prompt.text!r} asks for no words; put them in "double quotes"')
    return words


def _known(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"no {option} {value!r}{did_you_mean(str(value), known)}")
