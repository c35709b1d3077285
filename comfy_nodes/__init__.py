"""The ComfyUI node pack (V3 API), thin over ``dgpo_plugin``. Nothing here is imported outside ComfyUI."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./comfy_nodes/web"
"""Seen from the repository's root: ``docs/<node>.md`` (help pages) and ``js/`` (texts shown in nodes)."""


async def comfy_entrypoint() -> Any:
    """ComfyUI asks this for the pack's nodes."""
    from comfy_api.latest import ComfyExtension, io

    from . import nodes_adapters, nodes_compare, nodes_embedded, nodes_prompts, nodes_rewards, nodes_training

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [
                nodes_adapters.LoadAdapter,
                nodes_adapters.ShowAdapterCard,
                nodes_prompts.PromptList,
                nodes_rewards.LoadReward,
                nodes_rewards.ScoreImages,
                nodes_rewards.BestOfN,
                nodes_compare.CompareAdapter,
                nodes_training.TrainAdapter,
                nodes_embedded.LoadShapes,
            ]

    return Extension()
