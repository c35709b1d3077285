"""Texts encoded once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgpo_plugin.models.base import Model
from dgpo_plugin.models.conditioning import Conditioning


class EncodedTexts:
    """What the text encoders said to some texts, each encoded once, kept in main memory."""

    def __init__(self, model: Model, texts: Sequence[str]) -> None:
        unique = sorted(set(texts))
        self._row = {text: row for row, text in enumerate(unique)}
        self._all = model.encode(unique, torch.device("cpu"))

    def __getitem__(self, texts: Sequence[str]) -> Conditioning:
        return self._all[[self._row[text] for text in texts]]
