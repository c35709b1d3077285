"""What a reward is, several with their weights, and the check that every reward's output passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.config.short_forms import weighted_labels

USUAL_SCORING = ScoringConfig()
MOST_PROBLEMS = 5
"""Of one reward with its prompts, that are told one by one."""


class Reward:
    """Scores pictures; loaded once, called with whole batches. A subclass says how; what else it says is optional.

    Attributes:
        title: what it calls itself on the cards of adapters; empty for the name that it is loaded by.
        network: all its weights, for whoever manages a GPU's memory; None if it has none in this process.
        device: where the network runs; the next call brings it there.
    """

    title: str = ""
    network: nn.Module | None = None
    device: torch.device = torch.device("cpu")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of pictures.

        Args:
            images: float32 (N, 3, H, W) in [0, 1].
            prompts: N.

        Returns:
            (N,), higher is better.
        """
        raise NotImplementedError

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """What keeps it from judging some of the prompts, a line for each; none if it can judge them all."""
        return []


def problems(prompts: Sequence[Prompt], read: Callable[[Prompt], object]) -> list[str]:
    """What a function says of the prompts that it refuses with a :class:`UserError`, for :meth:`Reward.check`."""
    found = []
    for prompt in prompts:
        try:
            read(prompt)
        except UserError as error:
            found.append(str(error))
    return found


class FunctionReward(Reward):
    """A plain function of (images, prompts), or another object that is called so, as a reward."""

    def __init__(self, function: Callable[[Tensor, Sequence[Prompt]], Any]) -> None:
        self.function = function

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        return self.function(images, prompts)


class WrappedReward(Reward):
    """A reward around another one, which answers everything that a subclass does not answer itself."""

    def __init__(self, inner: Reward) -> None:
        self.inner = inner
        self.title = inner.title
        self.network = inner.network

    @property
    def device(self) -> torch.device:
        """Where the inner reward's network runs."""
        return self.inner.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.inner.device = device

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.inner(images, prompts)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return self.inner.check(prompts)


def as_reward(reward: Reward | Callable[[Tensor, Sequence[Prompt]], Any]) -> Reward:
    """A plain function as a reward; what is one already stays what it is."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


@dataclass(frozen=True)
class WeightedReward:
    """A loaded reward of a run.

    Attributes:
        weight: what its scores are multiplied by in the sum.
        scoring: how it is computed.
        name: the registered one (or the file's), where the label is another; empty where it is the same.
    """

    reward: Reward
    weight: float = 1.0
    scoring: ScoringConfig = USUAL_SCORING
    name: str = ""


class RewardSet:
    """Several rewards with their weights.

    Args:
        members: by label, in their order.
        sha256: of the files of users' own rewards, as they were when they were loaded; empty if there are none.

    Attributes:
        names: the K labels.
        weights: float32 (K,).
    """

    def __init__(self, members: Mapping[str, WeightedReward], sha256: str = "") -> None:
        self.members = dict(members)
        self.sha256 = sha256
        self.names = tuple(self.members)
        self.weights = torch.tensor([member.weight for member in self.members.values()])

    @property
    def title(self) -> str:
        """For adapters' cards: what each reward calls itself, or is called, with the weights if there are several."""
        return weighted_labels((_title(label, member), member.weight) for label, member in self.members.items())

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Every reward of every picture, without the weights.

        Args:
            pictures: float32 (N, 3, H, W) in [0, 1]; each reward gets a copy of its own.
            prompts: N.

        Returns:
            float32 (N, K) on the CPU, finite.

        Raises:
            UserError: a reward refuses, or gives what :func:`checked_rewards` refuses.
        """
        columns = [checked_rewards(m.reward, pictures, prompts, label) for label, m in self.members.items()]
        return torch.stack(columns, dim=1)

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum of scores (..., K), float32 (...)."""
        return (scores * self.weights.to(scores.device)).sum(-1)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Ask every reward whether it can judge the prompts, before any picture is drawn.

        Raises:
            UserError: names the prompts that cannot be judged, and why.
        """
        found = []
        for label, member in self.members.items():
            with prefixed(f"reward {label}"):
                problems = list(dict.fromkeys(member.reward.check(prompts)))
            if problems:
                more = len(problems) - MOST_PROBLEMS
                told = [*problems[:MOST_PROBLEMS], *([f"and {more} more prompts"] if more > 0 else [])]
                found.append(f"reward {label}: {'; '.join(told)}")
        if found:
            raise UserError("; ".join(found))


def _title(label: str, member: WeightedReward) -> str:
    """What a member of a set is called on a card."""
    named = f"{label} ({member.name})" if member.name not in ("", label) and not is_from_file(label) else label
    return member.reward.title or named


def checked_rewards(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str) -> Tensor:
    """Call a reward and refuse what no training should go on with.

    Args:
        images: float32 (N, 3, H, W) in [0, 1].
        name: for messages.

    Returns:
        float32 (N,), finite, on the CPU.

    Raises:
        UserError: the reward refuses, or gives not one number a picture, or any that is not finite.
    """
    with prefixed(f"reward {name}"):
        # A copy: what one reward writes into its pictures is not what the next one judges.
        values = torch.as_tensor(reward(images.clone(), prompts)).detach().to("cpu", torch.float32)
        if values.shape != (len(images),):
            raise UserError(
                f"returned shape {tuple(values.shape)} for {len(images)} images; "
                f"it must return one number for each image, shape ({len(images)},)"
            )
        broken = ~values.isfinite()
        if broken.any():
            first = int(broken.nonzero()[0])
            raise UserError(
                f"{int(broken.sum())} of {len(values)} values are not finite "
                f"(first: {values[first].item()} for prompt {prompts[first].text!r}); mend the reward"
            )
    return values
