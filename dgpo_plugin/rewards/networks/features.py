"""What a vision transformer without any text sees in a picture: features that tell pictures of one prompt apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import NeuralReward, from_hub
from dgpo_plugin.rewards.networks.pixels import shortest_to

SIDE = 256
"""Pixels of the middle square that is looked at, in whole patches; timm's for DINOv3."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, which DINOv2 and DINOv3 were trained with."""
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
        network, loaded = from_hub(what, lambda: AutoModel.from_pretrained(place, output_loading_info=True))
        if network.config.model_type not in ("dinov2", "dinov3_vit"):
            raise UserError(
                f"{what}: is a {network.config.model_type}; give a DINOv2 or DINOv3 of transformers, or null"
            )
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(f"{what}: lacks {len(missing)} of its weights (first: {missing[0]}); fetch it again")
        super().__init__(network, config)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, D), float32, on the network's device, of pictures (N, 3, H, W) in [0, 1]."""
        self.network.to(self.device)
        parts = [self._seen(batch.to(self.device)) for batch in images.split(self.config.batch_size)]
        if self.config.offload:
            self.network.to("cpu")
        return torch.cat(parts)

    def _seen(self, images: Tensor) -> Tensor:
        network: Any = self.network
        side = SIDE // network.config.patch_size * network.config.patch_size
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (shortest_to(images, side) - mean) / std
        pooled: Tensor = network(pixel_values=pixels.to(self.dtype)).pooler_output
        return pooled.float()
