"""What a vision transformer without any text sees in a picture: features that tell pictures of one prompt apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import NeuralReward, complete, from_hub
from dgpo_plugin.rewards.networks.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized, shortest_to

SIDE = 256
"""Pixels of the middle square that is looked at, in whole patches; timm's for DINOv3."""
OPTION = "algorithm.features"


class PictureFeatures(NeuralReward):
    """DINOv2 or DINOv3 of transformers: the class token after the last norm.

    Args:
        place: hub id or folder.
        config: the device, precision and batch size that rewards share.

    Raises:
        UserError: nothing is there, or it is no such network.
    """

    def __init__(self, place: str, config: ScoringConfig) -> None:
        what = f"{place} ({OPTION})"
        kind = from_hub(what, lambda: AutoConfig.from_pretrained(place)).model_type
        if kind not in ("dinov2", "dinov3_vit"):
            raise UserError(f"{what}: is a {kind}; give a DINOv2 or DINOv3 of transformers, or null")
        super().__init__(complete(AutoModel, place, what), config)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, D), float32, on the network's device, of pictures (N, 3, H, W) in [0, 1]."""
        return self.in_batches(images, lambda batch, _: self._seen(batch))

    def _seen(self, images: Tensor) -> Tensor:
        network: Any = self.network
        side = SIDE // network.config.patch_size * network.config.patch_size
        pixels = normalized(shortest_to(images, side), IMAGENET_MEAN, IMAGENET_STD)
        pooled: Tensor = network(pixel_values=pixels.to(self.dtype)).pooler_output
        return pooled
