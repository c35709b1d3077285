"""The presets that follow others' recipes have those recipes' numbers (config files of the repositories named)."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_plugin.config.load import load_config

pytestmark = pytest.mark.fast

# What a preset is held against, as places in its configuration.
NFT = {
    "training.prompts_per_iteration": 48,
    "training.group_size": 24,
    "training.ema_every": 1,
    "training.ema_decay": 0.9,
    "rollout.steps": 10,
    "schedule": "native",
    "algorithm.rollout_guidance": 1,
    "algorithm.kl_weight": 1e-4,
    "algorithm.timesteps": 9,
    "evaluation.guidance": 1,
}
NFT_OLD = ("algorithm.old_after", "algorithm.old_rate", "algorithm.old_limit")
AWM = {
    "training.group_size": 24,
    "training.updates_per_iteration": 1,
    "training.ema_every": 1,
    "training.ema_decay": 0.99,
    "rollout.steps": 14,
    "schedule": "native",
    "algorithm.rollout_guidance": 1,
    "algorithm.likelihood": "root",
    "algorithm.old_weight": 1,
    "algorithm.timesteps": 6,
    "algorithm.last_step": 11,
    "evaluation.guidance": 1,
}
DPPO = {
    "training.group_size": 16,
    "training.updates_per_iteration": 2,
    "rollout.steps": 10,
    "algorithm.guidance": 1,
    "algorithm.noise_level": 0.7,
    "algorithm.window": 3,
}
ALL = {
    "lora.rank": 32,
    "lora.alpha": 64,
    "lora.init": "gaussian",
    "model.max_sequence_length": 128,
    "training.learning_rate": 3e-4,
    "algorithm.advantage_std": "iteration",
    "evaluation.steps": 40,
}

RECIPES: dict[str, dict[str, Any]] = {
    # NVlabs/DiffusionNFT, config/nft.py, and return_decay of scripts/train_nft_sd3.py
    **{
        f"sd35-{task}-nft": {
            **NFT,
            "algorithm.mix": 1,
            "training.updates_per_iteration": 1,
            **dict(zip(NFT_OLD, (0, 0.001, 0.5), strict=True)),
        }
        for task in ("geneval", "pickscore")
    },
    "sd35-ocr-nft": {
        **NFT,
        "algorithm.mix": 0.1,
        "training.updates_per_iteration": 2,
        **dict(zip(NFT_OLD, (75, 0.0075, 0.999), strict=True)),
    },
    # scxue/advantage_weighted_matching, config/dgx_awm.py
    **{
        f"sd35-{task}-awm": {
            **AWM,
            "algorithm.kl_weight": weight,
            "algorithm.noise": noise,
            "algorithm.first_step": first,
            "training.prompts_per_iteration": prompts,
        }
        for task, weight, noise, first, prompts in (
            ("geneval", 1e-3, 0.4, 1, 72),
            ("ocr", 3e-3, 0.4, 1, 72),
            ("pickscore", 1e-4, 0, 0, 24),
        )
    },
    # X-GenGroup/Flow-Factory, examples/crd/lora/sd3_5/default.yaml
    "sd35-ocr-crd": {
        "training.prompts_per_iteration": 48,
        "training.group_size": 24,
        "training.updates_per_iteration": 2,
        "rollout.steps": 10,
        "algorithm.rollout_guidance": 1,
        "algorithm.reference_guidance": 4.5,
        "algorithm.timesteps": 20,
        "algorithm.noisiest_steps": 9,
        "algorithm.anchor_weight": 0.1,
        "evaluation.guidance": 1,
    },
    # Tencent-Hunyuan/UniRL, examples/diffusion/sd3/sd3_flowdppo.yaml
    "sd35-geneval-flow-dppo-sde-unconfirmed": {
        **DPPO,
        "training.prompts_per_iteration": 48,
        "training.weight_decay": 0,
        "algorithm.sampler": "flow-sde",
        "algorithm.threshold": 1e-5,
        "algorithm.window_range": 5,
        "algorithm.kl_weight": 0,
    },
    # X-GenGroup/Flow-Factory, examples/dppo/lora/sd3_5/geneval2_single.yaml; its average counts iterations
    "sd35-geneval-flow-dppo-cps-unconfirmed": {
        **DPPO,
        "training.prompts_per_iteration": 64,
        "training.ema_every": 4 * 2,
        "training.ema_decay": 0.9,
        "algorithm.sampler": "cps",
        "algorithm.threshold": 1e-6,
        "algorithm.window_range": 6,
        "algorithm.kl_weight": 1e-3,
        "algorithm.kl_of": "clean",
        "algorithm.reference_guidance": 4.5,
        "evaluation.guidance": 4.5,
    },
}


@pytest.mark.parametrize("preset", RECIPES)
def test_a_preset_has_its_recipes_numbers(preset: str) -> None:
    config: Any = load_config(preset)
    asked = {**ALL, **RECIPES[preset]}
    found = {}
    for place in asked:
        value = config
        for part in place.split("."):
            value = getattr(value, part)
        found[place] = value
    assert found == asked
