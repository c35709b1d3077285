"""Colored shapes on a plain ground: prompts, a verifier, and a small pipeline that draws them."""

from dgpo_plugin.common.names import World

WORLD = World(
    pipeline="dgpo_plugin:worlds/shapes/pipeline",
    prompt_sets={
        "train": "dgpo_plugin.worlds.shapes.scenes:train_prompts",
        "held-out": "dgpo_plugin.worlds.shapes.scenes:held_out_prompts",
        "out-of-domain": "dgpo_plugin.worlds.shapes.scenes:out_of_domain_prompts",
    },
    reward="dgpo_plugin.worlds.shapes.reward:ShapesReward",
    about_reward="half for the share of what was asked for, half for all of it and nothing else",
    pretrain="dgpo_plugin.worlds.shapes.pretrain:pretrain",
)
