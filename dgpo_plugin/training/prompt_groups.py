"""Which prompts an iteration's groups are of, and their texts, encoded."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.prompts.order import draw_prompt_groups

TEXTS_AT_ONCE = 1024
"""Encoded texts in main memory (gigabytes with a T5 encoder); larger sets are encoded as the run comes to them."""


class PromptGroups:
    """The prompts of a run, drawn by iteration; their texts and those of its evaluations are at hand, encoded.

    Args:
        prompts: what is trained on.
        evaluated: what is sampled between iterations.
        per_iteration: P, prompt groups an iteration.

    Attributes:
        encoded: texts of ``evaluated``, the empty one, and those of the current stretch of the run.
    """

    def __init__(
        self, model: Model, prompts: list[Prompt], evaluated: Sequence[Prompt], per_iteration: int, seed: int
    ) -> None:
        self.prompts = prompts
        self._model = model
        self._per_iteration = per_iteration
        self._seed = seed
        self._evaluated_texts = ["", *(prompt.text for prompt in evaluated)]
        every = sorted({*self._evaluated_texts, *(prompt.text for prompt in prompts)})
        self._all_at_once = len(every) <= TEXTS_AT_ONCE
        self._encoded_stretch: int | None = None
        self.encoded = EncodedTexts(model, every if self._all_at_once else self._evaluated_texts)

    def rows(self, iteration: int) -> list[int]:
        """Which of the prompts an iteration's groups are of, P of them."""
        return draw_prompt_groups(len(self.prompts), self._per_iteration, iteration, self._seed)

    def draw(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration's groups, P of them."""
        return [self.prompts[row] for row in self.rows(iteration)]

    def encode(self, iteration: int) -> bool:
        """Encode the texts of the iteration's stretch of the run, unless that is done; whether there were any to do.

        Stretches begin at fixed iterations, so that a resumed run encodes the same texts together, to the same bits.
        """
        length = max(1, TEXTS_AT_ONCE // self._per_iteration)
        stretch = iteration // length
        if self._all_at_once or stretch == self._encoded_stretch:
            return False
        drawn = [prompt for n in range(length) for prompt in self.draw(stretch * length + n)]
        self._encoded_stretch = stretch
        self.encoded = EncodedTexts(self._model, [*self._evaluated_texts, *(prompt.text for prompt in drawn)])
        return True
