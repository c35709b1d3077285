"""What goes along the wires between our nodes, and where the nodes stand in the menu."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "DGPO"


def written_lines(text: str) -> list[str]:
    """The lines of a text field, without the empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


Prompts = io.Custom("DGPO_PROMPTS")
"""list[dgpo_plugin.common.prompt.Prompt]"""
Reward = io.Custom("DGPO_REWARD")
"""comfy_nodes.loaded_reward.LoadedReward"""
