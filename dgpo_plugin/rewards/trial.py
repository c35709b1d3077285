"""Rewards of one's own tried on noise before a run loads its model: what they get wrong is told at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import wait

import torch

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import told
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.rewards.base import (
    NOT_FINITE,
    Reward,
    RewardSet,
    WeightedReward,
    WrappedReward,
    called,
    is_ours,
)
from dgpo_plugin.rewards.isolated import IsolatedReward
from dgpo_plugin.rewards.scorer import ask_apart
from dgpo_plugin.rewards.served.client import RemoteReward

PICTURES = 2


def is_tried(reward: Reward) -> bool:
    """Whether a reward is somebody else's code: a user's, another package's, a server's."""
    inner = reward
    while isinstance(inner, WrappedReward):
        inner = inner.inner
    return isinstance(inner, RemoteReward | IsolatedReward) or not is_ours(inner)


def try_out(rewards: RewardSet, height: int, width: int, prompts: Sequence[Prompt]) -> list[str]:
    """Call every reward that is somebody else's once, on two noisy pictures with the first two prompts.

    Args:
        height, width: of the pictures, in pixels.

    Returns:
        Lines of warning, of rewards that give values which are not finite: it may be the noise.

    Raises:
        UserError: one raises, returns anything but a number a picture, or takes longer than twice its time-out.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(PICTURES, 3, height, width, generator=generator)
    shown = [prompts[n % len(prompts)] for n in range(PICTURES)]
    warnings = []
    for label, member in rewards.members.items():
        if not is_tried(member.reward):
            continue
        with prefixed(f"reward {label}, tried on {PICTURES} noisy pictures of {width} x {height}"):
            values = _tried(member, pictures, shown)
        if not values.isfinite().all():
            then = "leaves its picture out" if member.scoring.on_failure == "skip" else "ends a run"
            warnings.append(
                f"reward {label}: gives {', '.join(f'{value:g}' for value in values.tolist())} for noisy pictures of "
                f"{width} x {height}; a value that is not finite {then}"
            )
    return warnings


def _tried(member: WeightedReward, pictures: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    """One call's values (N,), waited for twice as long as a call may take."""
    given_up = threading.Event()
    call = ask_apart(best_device(), lambda: called(member.reward, pictures, prompts, given_up))
    limit = member.scoring.timeout
    if call not in wait([call], None if limit is None else 2 * limit).done:
        given_up.set()
        raise UserError(f"no answer in twice {limit:g} s; raise scoring.timeout, or find out what it waits for")
    try:
        return call.result()
    except UserError as error:
        if NOT_FINITE in str(error):  # a served one's server says so
            return torch.full((len(pictures),), float("nan"))
        raise
    except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
        raise UserError(f"failed with {told(error)}") from error
