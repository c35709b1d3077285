"""Preferred pairs out of a model's own pictures and a reward: the best and the worst of each prompt.

python examples/make_pairs.py MODEL PROMPTS REWARD FOLDER [--prompts 200] [--pictures 4]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import EvaluationConfig, ModelConfig
from dgpo_plugin.config.load import load_config, preset_names, reward_terms
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.generate import fixed_noise, generate
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards import RewardSet, load_rewards


def make_pairs(
    model: Model, evaluation: EvaluationConfig, prompts: Sequence[Prompt], rewards: RewardSet, folder: Path, count: int
) -> int:
    """Write a pair for each prompt whose pictures the rewards tell apart, and how many those are.

    Args:
        count: pictures of each prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(prompts):
        noise = fixed_noise(model, range(number * count, (number + 1) * count), seed=0)
        pictures = generate(model, [prompt.text] * count, noise, evaluation.steps, evaluation.guidance).cpu()
        scores = rewards.total(rewards.score(pictures, [prompt] * count))
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] == scores[worst]:
            continue
        names = [f"{number:05d}-{kind}.png" for kind in ("chosen", "rejected")]
        for name, picture in zip(names, (best, worst), strict=True):
            to_image(pictures[picture]).save(folder / name)
        rows.append([prompt.text, *names])
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["prompt", "chosen", "rejected"], *rows])
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a preset's name, a diffusers folder or a hub id")
    parser.add_argument("prompt_set", help="as in prompts.train")
    parser.add_argument("reward", help="as in `dgpo list rewards`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200, help="how many of the set, spread over it")
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt")
    asked = parser.parse_args(arguments)
    base, evaluation = ModelConfig(path=asked.model), EvaluationConfig()
    if asked.model in preset_names():
        preset = load_config(asked.model)
        base, evaluation = preset.model.model_copy(update={"precision": "fp32"}), preset.evaluation
    every = load_prompts(asked.prompt_set)
    chosen = every[:: max(1, len(every) // asked.prompts)][: asked.prompts]
    rewards = load_rewards(*reward_terms([asked.reward]))
    rewards.check(chosen)
    made = make_pairs(load_model(base, best_device()), evaluation, chosen, rewards, asked.folder, asked.pictures)
    print(f"{made} pairs of {len(chosen)} prompts in {asked.folder}")


if __name__ == "__main__":
    main()
