"""What a reward is, sums of several, and the check that every reward's output passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt


class Reward(Protocol):
    """Scores pictures; loaded once, called with whole batches."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images float32 (N, 3, H, W) in [0, 1] and N prompts -> (N,), higher is better."""


class WeightedSum:
    """weight x reward, summed over rewards.

    Attributes:
        terms: reward and weight by name.
    """

    def __init__(self, terms: Mapping[str, tuple[Reward, float]]) -> None:
        self.terms = terms

    @property
    def title(self) -> str:
        """For cards: what each reward calls itself, or is called, with its weight if there are several."""
        titles = {getattr(reward, "title", name): weight for name, (reward, weight) in self.terms.items()}
        return " + ".join(f"{weight:g} {title}" if len(titles) > 1 else title for title, weight in titles.items())

    @property
    def weights(self) -> Tensor:
        """(K,)."""
        return torch.tensor([weight for _, weight in self.terms.values()])

    def parts(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, K): every reward by itself, without its weight."""
        return torch.stack([checked_rewards(r, images, prompts, name) for name, (r, _) in self.terms.items()], dim=1)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (self.parts(images, prompts) * self.weights).sum(1)


def as_sum(reward: Reward, name: str) -> WeightedSum:
    """A single reward as a sum of one."""
    return reward if isinstance(reward, WeightedSum) else WeightedSum({name: (reward, 1.0)})


def checked_rewards(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str) -> Tensor:
    """Call a reward and refuse what no training should go on with.

    Returns:
        float32 (N,), finite, on the CPU.

    Raises:
        UserError: not one number a picture, or any that is not finite.
    """
    # A copy: what one reward writes into its pictures is not what the next one judges.
    values = torch.as_tensor(reward(images.clone(), prompts)).detach().to("cpu", torch.float32)
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
