"""What pretraining has to know of a version of the shapes world, besides its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.worlds.shapes.render import VOCABULARY, Vocabulary
from dgpo_plugin.worlds.shapes.scenes import TASKS, all_prompts


@dataclass(frozen=True)
class Recipe:
    """What is drawn, said and looked at on the way.

    Attributes:
        vocabulary: what the pictures show.
        prompts: every caption that is trained on.
        task_weights: how often each task type's captions are drawn; they sum to 1.
        judged: the prompts that the log's accuracy is measured on.
        headline: the task types whose mean accuracy is logged as ``mean``.
        guidances: the scales that accuracy is measured at.
        images_per_task: pictures of each task type at each of them.
        start: the world whose weights are gone on with; empty for a start from nothing.
    """

    vocabulary: Vocabulary
    prompts: Sequence[Prompt]
    task_weights: Mapping[str, float]
    judged: Sequence[Prompt]
    headline: Sequence[str]
    guidances: Sequence[float]
    images_per_task: int = 64
    start: str = ""


RECIPE = Recipe(
    vocabulary=VOCABULARY,
    prompts=all_prompts(),
    task_weights=dict(zip(TASKS, (0.08, 0.12, 0.25, 0.10, 0.20, 0.25), strict=True)),
    judged=all_prompts(),
    headline=TASKS,
    guidances=(1.0, 2.5),
)
"""Version 1's."""
