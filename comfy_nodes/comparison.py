"""The same seeds sampled with and without an adapter, and what a reward thinks of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nodes import common_ksampler
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.models.decoded import PictureCheck

from .decoded import BLAME, decode
from .loaded_reward import LoadedReward
from .scores import score


@dataclass(frozen=True)
class SamplerSettings:
    """KSampler's settings; ``seed`` is the first prompt's, the next has one more."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str


@dataclass(frozen=True)
class Comparison:
    """What a reward says of two batches of pictures.

    Attributes:
        scores: without and with the adapter, one number per picture; None if there was no reward.
        gain: mean score with, minus without; 0 if there was no reward.
        report: lines for people.
    """

    scores: tuple[list[float], list[float]] | None
    gain: float
    report: str


def sample_both(
    without: Any,
    with_adapter: Any,
    clip: Any,
    vae: Any,
    latent: dict[str, Any],
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
) -> tuple[Tensor, Tensor]:
    """Pictures (N, H, W, C) of two models from the same noise: prompt by prompt, one for each latent.

    Raises:
        UserError: the models are not of one base, or what was decoded is no picture.
    """
    if without.model is not with_adapter.model:
        raise UserError("Compare adapter: the two models are different bases; patch the one that is 'without'")
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    check = PictureCheck(BLAME)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, prompt in enumerate(prompts):
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(prompt.text))
        for side, model in zip(sides, (without, with_adapter), strict=True):
            (sampled,) = common_ksampler(
                model,
                settings.seed + row,
                settings.steps,
                settings.cfg,
                settings.sampler,
                settings.scheduler,
                encoded,
                empty,
                dict(latent),
            )
            side.append(decode(vae, sampled["samples"], check))
    before, after = (torch.cat(side) for side in sides)
    return before, after


def score_both(reward: LoadedReward | None, before: Tensor, after: Tensor, prompts: Sequence[Prompt]) -> Comparison:
    """Score two batches (N, H, W, C) that hold equally many pictures of each prompt, in order."""
    if reward is None:
        return Comparison(None, 0.0, "no reward given")
    each = [prompt for prompt in prompts for _ in range(len(before) // len(prompts))]
    without, with_adapter = (score(reward, [side], each, "Compare adapter").values for side in (before, after))
    gain, report = summary(without, with_adapter, reward.name)
    return Comparison((without, with_adapter), gain, report)


def summary(before: Sequence[float], after: Sequence[float], name: str) -> tuple[float, str]:
    """The gain of the mean score, and two lines for people, with the standard error of the pairs' differences."""
    differences = torch.tensor(after) - torch.tensor(before)
    gain = float(differences.mean())
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else float("nan")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    first = f"{name}: {sum(before) / len(before):.4f} -> {sum(after) / len(after):.4f}, gain {gain:+.4f}"
    spread = f" (standard error {error:.4f})" if error == error else ""
    return gain, f"{first}{spread}\nbetter {better}, worse {worse}, equal {len(before) - better - worse}"
