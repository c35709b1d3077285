"""What goes along the wires between our nodes, and where the nodes stand in the menu."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "DGPO"
Prompts = io.Custom("DGPO_PROMPTS")
"""list[dgpo_plugin.prompts.Prompt]"""
Reward = io.Custom("DGPO_REWARD")
"""comfy_nodes.rewards.LoadedReward"""
