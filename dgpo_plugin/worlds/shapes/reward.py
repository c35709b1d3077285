"""The shapes world's verifier as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward, problems
from dgpo_plugin.worlds.shapes.render import SIZE, VOCABULARY
from dgpo_plugin.worlds.shapes.verify import verify


class ShapesReward(Reward):
    """Half for the share of what was asked for that is there, half for exactly that and nothing else, in [0, 1].

    The share alone is climbed more easily but stalls before the last object is right.
    """

    world = "shapes"
    vocabulary = VOCABULARY

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if images.shape[1:] != (3, SIZE, SIZE):
            raise UserError(f"judges {SIZE} x {SIZE} RGB pictures, got {tuple(images.shape[1:])}")
        verdicts = verify(images.cpu().numpy(), [self.wanted(prompt) for prompt in prompts], self.vocabulary)
        return torch.tensor([(verdict.partial + verdict.strict) / 2 for verdict in verdicts])

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, self.wanted)

    def wanted(self, prompt: Prompt) -> dict[str, Any]:
        """What a prompt of this world asks for: its metadata.

        Raises:
            UserError: it has none, or asks for what this version of the world does not have.
        """
        if "objects" not in prompt.metadata:
            raise UserError(f"prompt {prompt.text!r} has no metadata; take its prompts from {self.world}/...")
        known = {*self.vocabulary.figures, *self.vocabulary.colors, *self.vocabulary.sizes, None}
        asked = {item.get(key) for item in prompt.metadata["objects"] for key in ("shape", "colour", "size")}
        if unknown := asked - known:
            words = ", ".join(sorted(map(str, unknown)))
            raise UserError(
                f"prompt {prompt.text!r} asks for {words}, not in {self.world}; take its prompts from {self.world}/..."
            )
        return dict(prompt.metadata)
