"""A prompt: a text, and what a reward needs to know to judge the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dgpo_plugin.common.errors import UserError, cut_in_the_middle, is_unicode


@dataclass(frozen=True)
class Prompt:
    """One text to render.

    Attributes:
        text: what the text encoders read.
        metadata: what the reward reads (JSON types only); empty where the text is enough.
        place: where it is written, as ``file:line``, for messages; empty where it is in no file.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse half a character (a lone surrogate), which no tokenizer takes and no file keeps.

        Raises:
            UserError: it has one.
        """
        if not is_unicode(self.text):
            where = self.place or "prompt"
            raise UserError(f"{where}: has half of a character in {cut_in_the_middle(repr(self.text), 100)}; mend it")
