"""LAION's aesthetic predictor: how people would rate a picture's looks, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import NeuralReward, checkpoint_file, fill, load_published, pretrained
from dgpo_plugin.rewards.networks.clip import VIT_L, image_embeddings

LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Place in the published network, whose dropout layers count, and width of what comes out."""


class Aesthetic(NeuralReward):
    """A linear network (no activations) on CLIP ViT-L/14's picture embedding of length 1; 1 to 10, usually 5 to 6.

    Source: christophschuhmann/improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE``.

    Args:
        weights: a file in that format; the hub's copy if not given.
        clip: hub id or folder.
    """

    def __init__(self, config: ScoringConfig | None = None, weights: str | None = None, clip: str = VIT_L) -> None:
        path = checkpoint_file("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", weights)
        model = pretrained(CLIPModel, clip, "clip")
        widths = [model.config.projection_dim, *LAYERS.values()]
        head = nn.ModuleDict({str(place): nn.Linear(widths[n], widths[n + 1]) for n, place in enumerate(LAYERS)})
        fill(nn.ModuleDict({"layers": head}), load_published(path))
        super().__init__(nn.ModuleDict({"clip": model, "layers": head}), config)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert isinstance(self.network, nn.ModuleDict)
        values = normalize(image_embeddings(self.network["clip"], images), dim=-1).to(self.dtype)
        for layer in self.network["layers"].children():
            values = layer(values)
        return values[:, 0].float()
