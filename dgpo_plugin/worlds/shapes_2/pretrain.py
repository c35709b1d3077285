"""How the pipeline of shapes-2 was made: ``dgpo worlds pretrain shapes-2`` runs this file.

It goes on from the shipped pipeline of ``shapes`` (VAE, denoiser, text encoders and the words that both versions
have), with version 1's loops, and ends where validation prompts say that there is room left: see ``ENOUGH``.
"""

from __future__ import annotations

from pathlib import Path

from dgpo_plugin.worlds.shapes.pretrain import make_pipeline
from dgpo_plugin.worlds.shapes.pretrain_networks import PretrainConfig
from dgpo_plugin.worlds.shapes.pretrain_recipe import Recipe
from dgpo_plugin.worlds.shapes_2.scenes import (
    HEADLINE,
    TASKS,
    VOCABULARY,
    all_prompts,
    other_position_prompts,
    validation_prompts,
)

ENOUGH = 0.56
"""The headline's strict accuracy at its best guidance that ends the training: a base with room above it."""
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
TASK_WEIGHTS = dict(zip(TASKS, (0.04, 0.08, 0.24, 0.06, 0.10, 0.16, 0.16, 0.16), strict=True))
"""How often each task type's captions are drawn."""


def recipe() -> Recipe:
    """What is drawn, and judged on prompts that are in no test set."""
    return Recipe(
        vocabulary=VOCABULARY,
        prompts=all_prompts(),
        task_weights=TASK_WEIGHTS,
        judged=[*validation_prompts(), *other_position_prompts()],
        headline=HEADLINE,
        guidances=GUIDANCES,
        images_per_task=32,
        start="shapes",
    )


def settings(seed: int = 0, iterations: int = 30_000) -> PretrainConfig:
    """Every number that the weights depend on."""
    return PretrainConfig(
        seed=seed,
        pictures=16_000,
        vae_iterations=400,
        vae_learning_rate=1.5e-3,
        decoder_iterations=600,
        iterations=iterations,
        batch=32,
        log_every=2_500,
        enough=ENOUGH,
    )


def pretrain(output: Path, seed: int = 0, iterations: int | None = None, compile_model: bool = False) -> None:
    """Train the pipeline of shapes-2 and save it to a folder, which is made.

    Args:
        iterations: of the denoiser, at most; None for the shipped pipeline's.
        compile_model: let torch.compile make the denoiser faster.
    """
    numbers = settings(seed) if iterations is None else settings(seed, iterations)
    make_pipeline(output, numbers, recipe(), compile_model=compile_model)
