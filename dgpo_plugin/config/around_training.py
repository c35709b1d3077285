"""The parts of a configuration around training: prompts, evaluation, what is shown of a run and what is kept."""

from __future__ import annotations

from pydantic import Field

from dgpo_plugin.config.reward_fields import RewardTerms, Section


class EvaluationConfig(Section):
    """How a finished adapter is sampled and scored: what its users will do."""

    steps: int = Field(40, ge=1, description="Denoiser calls of an image, on the pipeline's own Euler sampler.")
    guidance: float = Field(4.5, ge=1, description="Classifier-free guidance; 1 is none.")
    images: int = Field(128, ge=2, description="Pictures that `reward before` and `reward after` are the mean of.")
    rewards: RewardTerms = Field(
        {},
        description="Where an algorithm learns from pairs: what judges the held-out pictures, as `rewards` elsewhere; "
        "empty for nothing.",
    )


class LoggingConfig(Section):
    """What is shown of a run; `metrics.jsonl` is always written."""

    trackers: tuple[str, ...] = Field(
        (), description="accelerate's trackers that get the metrics too: tensorboard, wandb and others, if installed."
    )
    sample_every: int = Field(
        10, ge=0, description="Iterations between two grids of pictures in the run's samples/; 0 for none."
    )
    sample_images: int = Field(16, ge=1, description="Pictures in such a grid, of the first held-out prompts.")


class CheckpointConfig(Section):
    """What `dgpo resume` goes on from."""

    every: int = Field(
        10, ge=1, description="Iterations between two checkpoints; the last iteration has one in any case."
    )
    keep: int = Field(
        2, ge=1, description="Newest checkpoints kept, besides the best (by mean reward since the one before)."
    )


class PromptsConfig(Section):
    """Prompt sets: a `.txt` or `.jsonl` file, `hf:owner/dataset`, or a set of `dgpo list prompts`."""

    train: str = Field(description="What reinforcement learning sees.")
    held_out: str | None = Field(
        None,
        description="What `reward before` and `reward after` are measured on, disjoint from train; null for train "
        "itself. Only where none of it is trained on is it called held-out.",
    )
