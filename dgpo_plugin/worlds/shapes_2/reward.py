"""The verifier of shapes-2 as a reward."""

from __future__ import annotations

from dgpo_plugin.worlds.shapes.reward import ShapesReward
from dgpo_plugin.worlds.shapes_2.scenes import VOCABULARY


class Shapes2Reward(ShapesReward):
    """Version 1's reward, in [0, 1], for the figures, colors and sizes of version 2."""

    world = "shapes-2"
    vocabulary = VOCABULARY
