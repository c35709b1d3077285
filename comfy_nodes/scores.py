"""Pictures of a ComfyUI scored by a reward, and what is chosen by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import checked_rewards

from .decoded import refuse_broken
from .loaded_reward import LoadedReward


def for_each(prompts: Sequence[Prompt], pictures: int, where: str) -> list[Prompt]:
    """A prompt for each picture: one serves all.

    Raises:
        UserError: neither one nor as many as there are pictures.
    """
    if len(prompts) not in (1, pictures):
        raise UserError(f"{where}: {len(prompts)} prompts for {pictures} pictures; give one, or one for each in order")
    return list(prompts) * (pictures if len(prompts) == 1 else 1)


def channels_first(images: Tensor) -> Tensor:
    """ComfyUI's pictures (N, H, W, C) as rewards take them, (N, 3, H, W) in [0, 1]."""
    return images[..., :3].movedim(-1, 1).float().clamp(0, 1).contiguous()


@dataclass(frozen=True)
class Scores:
    """One number a picture, with the prompt it was judged by."""

    values: list[float]
    prompts: list[Prompt]
    reward: str

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def report(self, order: Sequence[int] | None = None) -> str:
        """A line for each picture, numbered from 0."""
        lines = [f"{self.reward}: mean {self.mean:.4f} of {len(self.values)}"]
        chosen = range(len(self.values)) if order is None else order
        return "\n".join(lines + [f"{n:4}  {self.values[n]:8.4f}  {self.prompts[n].text}" for n in chosen])


def score(reward: LoadedReward, batches: Sequence[Tensor], prompts: Sequence[Prompt], where: str) -> Scores:
    """Scores of batches of pictures (N, H, W, C), which may differ in size.

    Raises:
        UserError: pictures that are not finite, or a number of prompts that does not fit.
    """
    each = for_each(prompts, sum(len(batch) for batch in batches), where)
    values: list[float] = []
    for batch in batches:
        refuse_broken(batch, where)
        judged_by = each[len(values) : len(values) + len(batch)]
        values += checked_rewards(reward, channels_first(batch), judged_by, reward.name).tolist()
    return Scores(values, each, Path(reward.name).name)


def chosen_latents(latents: dict[str, Any], order: list[int], count: int) -> dict[str, Any]:
    """The chosen ones of a latent batch, with what else is told of each (its mask, its seed's number)."""
    chosen = {**latents, "samples": latents["samples"][order]}
    mask = latents.get("noise_mask")
    if mask is not None and len(mask) == count:
        chosen["noise_mask"] = mask[order]
    chosen["batch_index"] = [latents.get("batch_index", list(range(count)))[n] for n in order]
    return chosen
