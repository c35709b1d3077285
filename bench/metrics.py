"""What is measured of pictures: the verifier's verdicts, in and out of domain, and what exposes reward hacking.

Each metric's meaning stands in :func:`metric_definitions`, its value comes from :func:`picture_metrics`; ``drift``,
which is no picture's, from :mod:`dgpo_bench.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.image_statistics import brightness, color_entropy, diversity, jpeg_size, sharpness
from dgpo_plugin.worlds.shapes.render import BACKGROUND, PALETTE
from dgpo_plugin.worlds.shapes.verify import Verdict, verify

from .results import Metric

PRIMARY = "accuracy"


_OUT_OF_DOMAIN: dict[str, tuple[str, Literal["higher", "lower", "none"], str]] = {
    "ood_accuracy": (
        "Out-of-domain accuracy",
        "higher",
        "Strict, on a whole task type that is never trained on.",
    ),
    "ood_partial_credit": ("Out-of-domain partial credit", "higher", "Partial credit on that task type."),
    "palette_error": ("Palette error", "lower", "Mean RGB distance of colored pixels to the nearest pure color."),
    "diversity": (
        "Diversity",
        "none",
        "Mean pixel RMS distance between pictures of one prompt; a fall is collapse.",
    ),
    "sharpness": (
        "Sharpness",
        "none",
        "Standard deviation of the Laplacian of the brightness; a fall is blur.",
    ),
    "color_entropy": ("Color entropy", "none", "Bits of an 8x8x8 RGB histogram; a fall is a poorer picture."),
    "brightness": ("Brightness", "none", "Mean of all channels; it should stay where the base has it."),
    "jpeg_size": (
        "JPEG size",
        "none",
        "Kilobytes as JPEG of quality 95; a fall is less detail, a rise is noise.",
    ),
    "drift": (
        "Drift from the base",
        "lower",
        "Mean squared velocity difference from the base on its own pictures.",
    ),
}
"""Label, direction and description of each metric that was not trained on, by name."""


def metric_definitions(tasks: Sequence[str]) -> dict[str, Metric]:
    """Every metric name of an evaluation, in the order of the report."""
    named = {
        "accuracy": Metric(
            label="Held-out accuracy",
            domain="in",
            better="higher",
            description="Strict verifier, prompts never trained on: exactly what was asked for; mean over task types.",
        ),
        "partial_credit": Metric(
            label="Held-out partial credit",
            domain="in",
            better="higher",
            description="The share of what was asked for, on the same pictures; with accuracy the training reward.",
        ),
    }
    for task in tasks:
        label = task.replace("_", " ")
        named[f"accuracy_{task}"] = Metric(
            label=f"Accuracy, {label}", domain="in", better="higher", description=f"Strict, task type {label} alone."
        )
    for name, (label, better, description) in _OUT_OF_DOMAIN.items():
        named[name] = Metric(label=label, domain="out", better=better, description=description)
    return named


def task_types(prompts: Sequence[Prompt]) -> list[str]:
    """The task types of prompts, in the order of their first."""
    return list(dict.fromkeys(prompt.metadata["task"] for prompt in prompts))


def picture_metrics(
    images: NDArray[np.float32], held_out: Sequence[Prompt], out_of_domain: Sequence[Prompt], images_per_prompt: int
) -> dict[str, float]:
    """All metrics of one set of pictures.

    Args:
        images: (N, 3, H, W) in [0, 1], of the held-out prompts and then of the others, each in a row of
            ``images_per_prompt``.
        held_out, out_of_domain: a prompt for each picture.
    """
    verdicts = verify(images, [dict(prompt.metadata) for prompt in (*held_out, *out_of_domain)])
    outside = verdicts[len(held_out) :]
    by_task = {
        task: [v for v, p in zip(verdicts, held_out, strict=False) if p.metadata["task"] == task]
        for task in task_types(held_out)
    }
    return {
        "accuracy": mean(_strict(group) for group in by_task.values()),
        "partial_credit": mean(_partial(group) for group in by_task.values()),
        **{f"accuracy_{task}": _strict(group) for task, group in by_task.items()},
        "ood_accuracy": _strict(outside),
        "ood_partial_credit": _partial(outside),
        "palette_error": palette_error(images),
        "diversity": diversity(images.reshape(-1, images_per_prompt, *images.shape[1:])),
        "sharpness": mean(sharpness(images)),
        "color_entropy": mean(color_entropy(images)),
        "brightness": mean(brightness(images)),
        "jpeg_size": mean(jpeg_size(images)),
    }


def training_reward(metrics: dict[str, float]) -> float:
    """The reward that was trained on, on the held-out pictures."""
    return (metrics["accuracy"] + metrics["partial_credit"]) / 2


def mean(values: Iterable[float]) -> float:
    """The mean of some numbers, at least one."""
    return float(np.mean(list(values)))


def _strict(verdicts: Sequence[Verdict]) -> float:
    """The share of pictures that show exactly what their prompts say."""
    return mean(verdict.strict for verdict in verdicts)


def _partial(verdicts: Sequence[Verdict]) -> float:
    """The mean share of what the prompts say that the pictures show."""
    return mean(verdict.partial for verdict in verdicts)


def palette_error(images: NDArray[np.float32]) -> float:
    """Mean RGB distance of clearly colored pixels to the nearest palette color; 0 without any such pixel."""
    pixels = images.transpose(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[np.linalg.norm(pixels - BACKGROUND, axis=1) > 0.4]
    if not len(pixels):
        return 0.0
    distances = [np.linalg.norm(pixels - color, axis=1) for color in PALETTE.values()]
    return float(np.min(distances, axis=0).mean())
