"""A prompt: a text, and what a reward needs to know to judge the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
