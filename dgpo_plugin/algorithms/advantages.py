"""Rewards (P, G) to advantages (P, G): how much better an image is than the others of its prompt group.

A reward that is NaN is of a picture that was not scored (``scoring.on_failure: skip``): means and deviations are over
the scored ones, and its advantage is 0. Where all are scored, every number is torch's own mean and std to the bit.
"""

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
        rewards: (P, G), finite, or NaN where there is none.
        std: of each ``group``, or of all rewards of the ``iteration``, both without Bessel's correction; with ``none``
            nothing is divided by it, nor by EPSILON (Dr. GRPO, arXiv 2503.20783).

    Returns:
        (P, G); a group whose rewards are all equal, or with fewer than two of them, has only zeros.
    """
    mean, group_std = group_statistics(rewards)
    advantages = rewards - mean
    if std != "none":
        advantages = advantages / ((group_std if std == "group" else _iteration_std(rewards)) + EPSILON)
    advantages = advantages.clamp(-limit, limit)
    # A constant group's mean can differ from its rewards in the last bit; that is no preference.
    return advantages.masked_fill(constant_groups(rewards) | rewards.isnan(), 0.0)


def aggregate(parts: Tensor, weights: Tensor, std: AdvantageStd, how: Literal["rewards", "advantages"]) -> Tensor:
    """Advantages (P, G) from several rewards (P, G, K) and their weights (K,).

    A picture that lacks one of its rewards counts for none of them.

    Args:
        how: ``rewards`` normalises their weighted sum; ``advantages`` normalises each reward by itself, so that none
            drowns another by its scale, and divides the weighted sum of those by its spread over the iteration
            (GDPO, arXiv 2601.05242: each group's mean is 0 already, so there is no other mean to take away); with
            ``none`` neither is done, and it is the sum that ``rewards`` makes too.
    """
    if how == "rewards":
        return normalize((parts * weights).sum(2), std)
    missing = parts.isnan().any(2)
    scored = parts.masked_fill(missing[..., None], math.nan)
    each = [weight * normalize(part, std, math.inf) for weight, part in zip(weights, scored.unbind(2), strict=True)]
    total: Tensor = sum(each[1:], each[0])
    if std != "none":
        total = total / (_iteration_std(total.masked_fill(missing, math.nan)) + EPSILON)
    return total.clamp(-LIMIT, LIMIT)


def group_statistics(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (without Bessel's correction) of each group's scored rewards, both (P, 1).

    Args:
        rewards: (P, G), NaN where there is none; a group with none at all has the mean and the deviation 0.
    """
    missing = rewards.isnan()
    if not missing.any():
        return rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, correction=0)
    scored = (~missing).sum(1, keepdim=True).clamp(min=1)
    mean = rewards.nansum(1, keepdim=True) / scored
    return mean, ((rewards - mean).square().nansum(1, keepdim=True) / scored).sqrt()


def constant_groups(rewards: Tensor) -> Tensor:
    """Which groups of (P, G) have no two scored rewards that differ, (P, 1): nothing can be learned from them."""
    missing = rewards.isnan()
    lowest = rewards.masked_fill(missing, math.inf).amin(1, keepdim=True)
    return lowest >= rewards.masked_fill(missing, -math.inf).amax(1, keepdim=True)


def _iteration_std(rewards: Tensor) -> Tensor:
    """Standard deviation, without Bessel's correction, of all scored rewards (P, G) together, of one element."""
    if not rewards.isnan().any():
        return rewards.std(correction=0)
    return group_statistics(rewards.flatten()[None])[1]
