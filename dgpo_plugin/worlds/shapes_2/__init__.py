"""The shapes world with more figures, colors and sizes, and with enough prompts of each task type for a headline."""

from dgpo_plugin.common.names import World

WORLD = World(
    pipeline="dgpo_plugin:worlds/shapes_2/pipeline",
    prompt_sets={
        "train": "dgpo_plugin.worlds.shapes_2.scenes:train_prompts",
        "validation": "dgpo_plugin.worlds.shapes_2.scenes:validation_prompts",
        "held-out": "dgpo_plugin.worlds.shapes_2.scenes:held_out_prompts",
        "out-of-domain": "dgpo_plugin.worlds.shapes_2.scenes:out_of_domain_prompts",
    },
    reward="dgpo_plugin.worlds.shapes_2.reward:Shapes2Reward",
    about_reward="half for the share of what was asked for, half for all of it and nothing else",
    pretrain="dgpo_plugin.worlds.shapes_2.pretrain:pretrain",
)
