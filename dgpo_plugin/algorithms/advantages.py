"""Rewards (P, G) to advantages (P, G): how much better an image is than the others of its prompt group."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from dgpo_plugin.config.fields import AdvantageStd

LIMIT = 5.0
"""Advantages are clipped to it."""
EPSILON = 1e-4


def normalize(rewards: Tensor, std: AdvantageStd, limit: float = LIMIT) -> Tensor:
    """A = clip((r - mean of the group) / (std + EPSILON), +-limit); docs/architecture.md, section 4.

    Args:
        rewards: (P, G), finite.
        std: of each ``group``, or of all rewards of the ``iteration``; both without Bessel's correction.

    Returns:
        (P, G); a group whose rewards are all equal has only zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0) if std == "group" else rewards.std(correction=0)
    advantages = (centred / (spread + EPSILON)).clamp(-limit, limit)
    # A constant group's mean can differ from its rewards in the last bit; that is no preference.
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(constant, 0.0)


def aggregate(parts: Tensor, weights: Tensor, std: AdvantageStd, how: Literal["rewards", "advantages"]) -> Tensor:
    """Advantages (P, G) from several rewards (P, G, K) and their weights (K,).

    Args:
        how: ``rewards`` normalises their weighted sum; ``advantages`` normalises each reward by itself, so that none
            drowns another by its scale, and divides the weighted sum of those by its spread over the iteration
            (GDPO, arXiv 2601.05242: each group's mean is 0 already, so there is no other mean to take away).
    """
    if how == "rewards":
        return normalize((parts * weights).sum(2), std)
    each = [weight * normalize(part, std, math.inf) for weight, part in zip(weights, parts.unbind(2), strict=True)]
    total: Tensor = sum(each[1:], each[0])
    return (total / (total.std(correction=0) + EPSILON)).clamp(-LIMIT, LIMIT)
