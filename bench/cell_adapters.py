"""The adapters of a cell: the best so far while it trains, and at its end the files with what their cards say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors.torch import load, save
from torch import Tensor

from dgpo_plugin.adapters.save import TrainingFacts
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, read_bytes
from dgpo_plugin.training.trainer import Trainer

from .pictures import Pictures
from .plan import Plan
from .prompt_sets import TEST, SampledSet
from .records import BASE

_SO_FAR = "best-so-far-{}.safetensors"


def best_adapter_file(folder: Path) -> Path:
    """Where the adapter of a cell's best checkpoint lies, unless that is its last."""
    return folder / "adapter-best.safetensors"


def write_best(folder: Path, checkpoint: int, weights: Mapping[str, Tensor]) -> None:
    """Keep the weights of a cell's best checkpoint so far, bit for bit, for a killed cell to go on with.

    Those before stay until :func:`forget_best`: what the cell would go on from may name them.
    """
    blob = save({name: tensor.contiguous().cpu() for name, tensor in weights.items()})
    with atomic_path(folder / _SO_FAR.format(checkpoint)) as temporary:
        temporary.write_bytes(blob)


def read_best(folder: Path, checkpoint: int) -> dict[str, Tensor]:
    """The weights that :func:`write_best` kept.

    Raises:
        OSError: there are none.
        UserError: they are damaged.
    """
    path = folder / _SO_FAR.format(checkpoint)
    try:
        weights: dict[str, Tensor] = load(read_bytes(path))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); remove it and start the cell again") from error
    return weights


def forget_best(folder: Path, but: int = 0) -> None:
    """Remove what :func:`write_best` kept of other checkpoints."""
    for path in folder.glob(_SO_FAR.format("*")):
        if path.name != _SO_FAR.format(but):
            path.unlink(missing_ok=True)


def facts(plan: Plan, trainer: Trainer, rows: Pictures, test: SampledSet, checkpoint: int, steps: int) -> TrainingFacts:
    """What an adapter's card says: the training reward on the curve's test prompts, of the base and of the adapter.

    Args:
        rows: the base's and the cell's.
        checkpoint: of the cell, whose weights they are.
        steps: that they have had.
    """
    before, after = (
        _training_reward(plan, rows.where(np.isin(rows.prompt, test.curve) & chosen & (rows.image < test.images)))
        for chosen in (
            (rows.entry == BASE) & (rows.set == TEST) & (rows.guidance == plan.guidance),
            (rows.checkpoint == checkpoint) & (rows.set == TEST) & (rows.guidance == plan.guidance),
        )
    )
    return TrainingFacts(
        trainer.config,
        steps,
        reward_before=before,
        reward_after=after,
        measured_on="test prompts",
        guard="" if trainer.guard is None else trainer.guard.told,
    )


def _training_reward(plan: Plan, rows: Pictures) -> float | None:
    """The weighted sum of what is trained on; None where a part of it is not measured."""
    parts = [
        term.weight * float(rows.metrics[label].mean())
        for label, term in plan.task.rewards.items()
        if label in rows.metrics and plan.task.metric(label).reward == term.name(label)
    ]
    total = sum(parts)
    return total if len(parts) == len(plan.task.rewards) and math.isfinite(total) else None
