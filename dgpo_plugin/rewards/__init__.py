"""Rewards: pictures and prompts in, one number a picture out, higher is better."""

from dgpo_plugin.rewards.registry import REWARDS, Reward, checked_rewards, load_reward

__all__ = ["REWARDS", "Reward", "checked_rewards", "load_reward"]
