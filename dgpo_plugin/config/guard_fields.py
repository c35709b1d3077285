"""The part of a configuration that watches a run for reward hacking, and what it may not watch with."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import Field, field_validator

from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.reward_fields import RewardTerm, RewardTerms, Section

WATCHED_ANYWAY = ("sharpness", "diversity")
"""Statistics that every guard watches, but for one that is trained on."""
RESERVED = ("reward", *WATCHED_ANYWAY)
"""Names of what every guard writes into the metrics, which no metric of its own may have."""
TOLD_BY_OPTIONS = ("remote", "judge")
"""Rewards that are another for every other setting."""


class GuardConfig(Section):
    """An alarm for reward hacking: the reward rises on validation prompts while something else falls. Every so many
    iterations the adapter as it would be exported draws prompts of prompts.held_out that are not trained on, with
    evaluation's steps and guidance, from the noise that the base drew them from. Sharpness, diversity or a metric has
    fallen if the mean of its paired differences from the base is more than three standard errors below 0, prompts being
    the clusters, and more than half a standard deviation of the base's pictures. One that has at two looks in a row,
    the reward's mean being above the base's at both, is an alarm.
    """

    every: int = Field(10, ge=1, description="Iterations between two looks.")
    prompts: int = Field(
        32, ge=8, description="Validation prompts, evenly spread over prompts.held_out; all, if it has fewer."
    )
    images: int = Field(2, ge=2, le=1000, description="Pictures of each; diversity is measured between them.")
    metrics: RewardTerms = Field(
        {},
        description="Rewards that are not trained on, which are to stay where the base has them, as in `rewards`, "
        "short forms too; with a weight below 0 it is a rise that counts as a fall. Sharpness and diversity are "
        "watched in any case.",
    )
    stop: bool = Field(
        False,
        description="End the run at an alarm and export the best of the looks: the highest mean reward on the "
        "validation prompts among those where nothing had fallen, the base itself where there is none. Otherwise the "
        "alarm is told, and the run goes on.",
    )

    @field_validator("metrics")
    @classmethod
    def _named_apart(cls, metrics: dict[str, RewardTerm]) -> dict[str, RewardTerm]:
        for label, term in metrics.items():
            if label in RESERVED or term.name(label) in WATCHED_ANYWAY:
                why = "is watched anyway; leave it out" if term.name(label) in WATCHED_ANYWAY else "is taken"
                raise ValueError(f"the name {label} {why}, or give the metric another label")
        return metrics


def refuse_trained(guard: GuardConfig, rewards: Mapping[str, RewardTerm]) -> None:
    """Refuse a guard's metrics that are trained on: what is optimized cannot tell how far it is hacked.

    Raises:
        ValueError: names the first, and the reward that it is.
    """
    trained = {_which(label, term): label for label, term in rewards.items()}
    for label, term in guard.metrics.items():
        if (same := trained.get(_which(label, term))) is not None:
            raise ValueError(
                f"training.guard.metrics: {label} is trained on (rewards.{same}), so its rise proves nothing; name a "
                f"reward that is not"
            )


def _which(label: str, term: RewardTerm) -> tuple[str, str]:
    """What tells a reward from another: its name, a file's by its place, and the settings where they tell."""
    name = term.name(label)
    if is_from_file(name):
        file, _, attribute = name.rpartition(":")
        name = f"{os.path.abspath(file)}:{attribute}"
    return name, repr(sorted(term.options.items())) if name in TOLD_BY_OPTIONS else ""
