"""What an algorithm learns from, rewards or preferred pairs, and what a configuration then has and lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dgpo_plugin.config.reward_fields import Section

if TYPE_CHECKING:
    from dgpo_plugin.config.fields import RunConfig

Need = Literal["rollout", "rewards", "pairs"]
REWARDED: frozenset[Need] = frozenset({"rollout", "rewards"})
PREFERRED: frozenset[Need] = frozenset({"pairs"})
PAIR = 2
"""Pictures of a pair, the group of an algorithm that learns from pairs: the chosen one first."""


class PairsConfig(Section):
    """Preferred pairs: two pictures of a prompt, of which one was chosen. docs/pairs.md says how to prepare them."""

    train: str = Field(
        description="A table (.csv, .tsv, .json, .jsonl) with the columns prompt, chosen and rejected; a folder with "
        "such a table called pairs; one with a folder for each prompt; or `hf:owner/dataset`, with `:split` behind it. "
        "`pairs: FOLDER` is short for it."
    )
    held_out: str | None = Field(
        None, description="Likewise, pairs that are not trained on, for held_out_accuracy; null for none."
    )


def filled_in(values: Mapping[str, Any], needs: frozenset[Need]) -> dict[str, Any]:
    """A configuration's values with what follows from what its algorithm learns from.

    Prompts and group size come with pairs, and no rewards are needed; what is given all the same stays, for
    :func:`misplaced` to name.
    """
    pairs = values.get("pairs")
    filled = {**values, **({"pairs": {"train": pairs}} if isinstance(pairs, str) else {})}
    if "pairs" not in needs:
        return filled
    if pairs is None:
        filled["pairs"] = {"train": ""}
    if values.get("rewards") is None:
        filled["rewards"] = {}
    prompts, training = values.get("prompts"), values.get("training")
    if prompts is None or isinstance(prompts, Mapping):
        filled["prompts"] = {**(prompts or {}), "train": (prompts or {}).get("train") or ""}
    if training is None or isinstance(training, Mapping):
        filled["training"] = {"group_size": PAIR, **(training or {})}
    return filled


def misplaced(config: RunConfig) -> list[str]:
    """What a configuration lacks, or has, that does not go with what its algorithm learns from; a text for each."""
    name = config.algorithm.name
    if "pairs" not in config.algorithm.needs:
        found = []
        if config.pairs is not None:
            found.append(f"pairs: {name} learns from rewards; leave pairs out, or set algorithm.name to diffusion-dpo")
        if config.evaluation.rewards:
            found.append(f"evaluation.rewards: {name} learns from rewards, which are measured too; leave them out here")
        return found
    rollout = ", ".join(config.rollout.model_dump(exclude_defaults=True))
    lacks_pairs = config.pairs is None or not config.pairs.train
    wrong = {
        "pairs.train is missing; name a table or a folder of preferred pairs": lacks_pairs,
        "rewards: leave them out; under evaluation.rewards they may judge held-out pictures": bool(config.rewards),
        "prompts.train: leave it out, the prompts are the pairs' own": bool(config.prompts.train),
        f"rollout: leave out {rollout}, nothing is sampled to learn from": bool(rollout),
        "training.group_size: leave it out, a pair has two pictures": config.training.group_size != PAIR,
        "training.control: leave it out, it is for rewards": config.training.control is not None,
    }
    told = [said for said, is_wrong in wrong.items() if is_wrong]
    return [f"{name} learns from pairs; {'; '.join(told)}"] if told else []
