"""The rewards by name, and the check that every reward's output passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dgpo_plugin.config import RewardConfig, did_you_mean
from dgpo_plugin.errors import UserError
from dgpo_plugin.prompts import Prompt
from dgpo_plugin.rewards.shapes import ShapesReward


class Reward(Protocol):
    """Scores pictures; loaded once, called with whole batches."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images float32 (N, 3, H, W) in [0, 1] and N prompts -> (N,), higher is better."""


REWARDS: dict[str, Callable[[], Reward]] = {"shapes": ShapesReward}


def load_reward(config: RewardConfig) -> Reward:
    """Load the reward that the configuration names, once."""
    if config.name not in REWARDS:
        raise UserError(f"reward.name: no reward {config.name!r}{did_you_mean(config.name, REWARDS)}")
    return REWARDS[config.name]()


def checked_rewards(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str) -> Tensor:
    """Call a reward and refuse what no training should go on with.

    Returns:
        float32 (N,), finite, on the CPU.

    Raises:
        UserError: not one number a picture, or any that is not finite.
    """
    values = torch.as_tensor(reward(images, prompts)).detach().to("cpu", torch.float32)
    if values.shape != (len(images),):
        raise UserError(
            f"reward {name}: returned shape {tuple(values.shape)} for {len(images)} images; "
            f"it must return one number for each image, shape ({len(images)},)"
        )
    broken = ~values.isfinite()
    if broken.any():
        first = int(broken.nonzero()[0])
        raise UserError(
            f"reward {name}: {int(broken.sum())} of {len(values)} values are not finite "
            f"(first: {values[first].item()} for prompt {prompts[first].text!r}); mend the reward"
        )
    return values
