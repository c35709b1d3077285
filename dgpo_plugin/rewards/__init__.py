"""Rewards: one file each; the registry names them and checks what they return."""

from dgpo_plugin.rewards.base import Reward, WeightedSum, as_sum, checked_rewards
from dgpo_plugin.rewards.registry import REWARDS, RewardInfo, load_reward, reward_names

__all__ = ["REWARDS", "Reward", "RewardInfo", "WeightedSum", "as_sum", "checked_rewards", "load_reward", "reward_names"]
