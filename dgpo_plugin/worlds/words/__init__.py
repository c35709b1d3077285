"""Words on colored grounds: prompts, and a small pipeline that draws them; text recognition judges them."""

from dgpo_plugin.common.names import World

WORLD = World(
    pipeline="dgpo_plugin:worlds/words/pipeline",
    prompt_sets={
        "train": "dgpo_plugin.worlds.words.captions:train_prompts",
        "validation": "dgpo_plugin.worlds.words.captions:validation_prompts",
        "held-out": "dgpo_plugin.worlds.words.captions:held_out_prompts",
        "out-of-domain": "dgpo_plugin.worlds.words.captions:out_of_domain_prompts",
    },
    pretrain="dgpo_plugin.worlds.words.pretrain:pretrain",
    size=(64, 32),
)
"""The reward ``ocr`` reads its pictures."""
