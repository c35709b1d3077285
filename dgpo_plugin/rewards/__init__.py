"""Rewards: one file each; the registry names them and checks what they return."""

from dgpo_plugin.rewards.base import Reward, RewardSet, WeightedReward, WrappedReward, as_reward, checked_rewards
from dgpo_plugin.rewards.load import load_reward, load_rewards
from dgpo_plugin.rewards.registry import REWARDS, RewardEntry

__all__ = [
    "REWARDS",
    "Reward",
    "RewardEntry",
    "RewardSet",
    "WeightedReward",
    "WrappedReward",
    "as_reward",
    "checked_rewards",
    "load_reward",
    "load_rewards",
]
