"""The rewards by name, a user's own, sums of several, and the check that every reward's output passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from dgpo_plugin.config import RewardConfig, did_you_mean
from dgpo_plugin.errors import UserError
from dgpo_plugin.prompts import Prompt
from dgpo_plugin.rewards.own import is_own, load_own
from dgpo_plugin.rewards.shapes import ShapesReward


class Reward(Protocol):
    """Scores pictures; loaded once, called with whole batches."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images float32 (N, 3, H, W) in [0, 1] and N prompts -> (N,), higher is better."""


@dataclass(frozen=True)
class RewardInfo:
    """A reward that is not loaded yet.

    Attributes:
        load: makes it, slow or not.
        measures, range: for people.
        needs: modules that must be installed, by the extra ``rewards``.
    """

    load: Callable[[], Reward]
    measures: str
    range: str = "[0, 1]"
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]


def _ocr() -> Reward:
    from dgpo_plugin.rewards.ocr import OcrReward

    return OcrReward()


REWARDS: dict[str, RewardInfo] = {
    "shapes": RewardInfo(ShapesReward, "the embedded world: half for the share of what was asked, half for all of it"),
    "ocr": RewardInfo(
        _ocr, "the words in double quotes (or metadata text) as read back", needs=("rapidocr", "onnxruntime")
    ),
}
GROUP = "dgpo_plugin.rewards"
"""Entry points of other packages: a name, and a class or function of the protocol above."""


def reward_names() -> dict[str, RewardInfo]:
    """Ours, and those that installed packages bring."""
    points = entry_points(group=GROUP)
    found = {point.name: RewardInfo(_loader(point), f"from {point.value}", "its own") for point in points}
    return {**found, **REWARDS}


def load_reward(config: RewardConfig) -> Reward:
    """Load what the configuration names, once.

    Raises:
        UserError: no such reward, one that needs a package that is not installed, or a user's own that is broken.
    """
    if config.sum:
        return WeightedSum({name: (_load(name), weight) for name, weight in config.sum.items()})
    return _load(config.name or "")


def _load(name: str) -> Reward:
    if is_own(name):
        own: Reward = load_own(name)
        return own
    known = reward_names()
    if name not in known:
        raise UserError(f"reward.name: no reward {name!r}{did_you_mean(name, known)}; or name a file.py:function")
    if known[name].missing:
        raise UserError(f"reward {name}: needs {', '.join(known[name].missing)}; pip install 'dgpo-plugin[rewards]'")
    return known[name].load()


class WeightedSum:
    """weight x reward, summed over rewards."""

    def __init__(self, terms: Mapping[str, tuple[Reward, float]]) -> None:
        self.terms = terms

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        total = torch.zeros(len(images))
        for name, (reward, weight) in self.terms.items():
            total += weight * checked_rewards(reward, images, prompts, name)
        return total


def _loader(point: EntryPoint) -> Callable[[], Reward]:
    def load() -> Reward:
        thing: Any = point.load()
        made: Reward = thing() if isinstance(thing, type) else thing
        return made

    return load


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
