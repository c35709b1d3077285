"""Rewards: one file each; the registry names them and checks what they return."""

from dgpo_plugin.rewards.registry import REWARDS, Reward, RewardInfo, checked_rewards, load_reward, reward_names

__all__ = ["REWARDS", "Reward", "RewardInfo", "checked_rewards", "load_reward", "reward_names"]
