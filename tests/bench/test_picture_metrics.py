"""What is measured of pictures that are drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dgpo_bench.metrics import metric_definitions, palette_error, picture_metrics
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.worlds.shapes.render import BACKGROUND, SceneObject, draw


def picture(*objects: SceneObject) -> np.ndarray:
    return draw(list(objects))


@pytest.mark.fast
def test_the_palette_error_notices_other_colors() -> None:
    sharp = picture(SceneObject("square", "red", 20, 20, 8), SceneObject("circle", "blue", 44, 44, 8))
    faded = sharp * 0.6
    assert palette_error(faded[None]) > palette_error(sharp[None]) + 0.05
    blank = np.broadcast_to(BACKGROUND[:, None, None], sharp.shape).astype(np.float32)
    assert palette_error(blank[None]) == 0


@pytest.mark.fast
def test_every_metric_of_a_picture_has_its_definition() -> None:
    prompts = load_prompts("shapes/held-out")[:2]
    images = np.stack([picture(SceneObject("square", "red", 20, 20, 8))] * 4).astype(np.float32)
    measured = picture_metrics(images, [prompts[0]] * 2, [prompts[1]] * 2, 2)
    named = metric_definitions([prompts[0].metadata["task"]])
    assert [name for name in named if name != "drift"] == list(measured)
    assert measured["diversity"] == 0
