"""Rewards (P, G) to advantages (P, G): how much better an image is than the others of its prompt group."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

AdvantageStd = Literal["group", "iteration"]


def normalise(rewards: Tensor, std: AdvantageStd, limit: float = 5.0) -> Tensor:
    """A = clip((r - mean of the group) / (std + 1e-4), +-limit), DESIGN section 4.

    Args:
        rewards: (P, G), finite.
        std: of each ``group``, or of all rewards of the ``iteration``; both without Bessel's correction.

    Returns:
        (P, G); a group whose rewards are all equal has only zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0) if std == "group" else rewards.std(correction=0)
    advantages = (centred / (spread + 1e-4)).clamp(-limit, limit)
    # A constant group's mean can differ from its rewards in the last bit; that is no preference.
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(constant, 0.0)
