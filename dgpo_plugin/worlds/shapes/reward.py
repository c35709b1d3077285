"""The shapes world's verifier as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward, problems
from dgpo_plugin.worlds.shapes.render import SIZE
from dgpo_plugin.worlds.shapes.verify import verify


class ShapesReward(Reward):
    """Half for the share of what was asked for that is there, half for exactly that and nothing else, in [0, 1].

    The share alone is climbed more easily but stalls before the last object is right.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if images.shape[1:] != (3, SIZE, SIZE):
            raise UserError(f"judges {SIZE} x {SIZE} RGB pictures, got {tuple(images.shape[1:])}")
        verdicts = verify(images.cpu().numpy(), [wanted(prompt) for prompt in prompts])
        return torch.tensor([(verdict.partial + verdict.strict) / 2 for verdict in verdicts])

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, wanted)


def wanted(prompt: Prompt) -> dict[str, Any]:
    """What a prompt of this world asks for: its metadata.

    Raises:
        UserError: it has none.
    """
    if "objects" not in prompt.metadata:
        raise UserError(f"prompt {prompt.text!r} has no metadata; take its prompts from shapes/...")
    return dict(prompt.metadata)
