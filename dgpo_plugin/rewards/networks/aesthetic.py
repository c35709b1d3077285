"""LAION's aesthetic predictor: how people would rate a picture's looks, whatever it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import NeuralReward, checkpoint_file, fill, load_published, pretrained
from dgpo_plugin.rewards.networks.clip import VIT_L, image_embeddings

LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Place in the published network, whose dropout layers count, and width of what comes out."""
IMPROVED = "sac+logos+ava1-l14-linearMSE.pth"
FIRST_OF = {768: "ViT-L/14", 512: "ViT-B/32 or ViT-B/16"}
"""By the length of the embedding: which CLIP model LAION's first predictors are of (LAION-AI/aesthetic-predictor)."""


class Aesthetic(NeuralReward):
    """A linear network (no activations) on CLIP ViT-L/14's picture embedding of length 1; 1 to 10, usually 5 to 6.

    Source: christophschuhmann/improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE``.

    Pictures that are not square are cropped as transformers' CLIP processor does, half a pixel of offset down: so the
    scores of Flow-GRPO's and DDPO's papers were made. LAION's ``simple_inference.py`` crops with torchvision, half a
    pixel to the nearest even one (:func:`.pixels.middle_square`).

    Args:
        weights: a file in that format; the hub's copy if not given.
        clip: hub id or folder.

    Raises:
        UserError: the weights are those of another predictor, or of another CLIP model.
    """

    def __init__(self, config: ScoringConfig | None = None, weights: str | None = None, clip: str = VIT_L) -> None:
        path = checkpoint_file("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", weights)
        tensors = load_published(path)
        _refuse_first_predictor(tensors, str(path))
        model = pretrained(CLIPModel, clip, "clip")
        widths = [model.config.projection_dim, *LAYERS.values()]
        head = nn.ModuleDict({str(place): nn.Linear(widths[n], widths[n + 1]) for n, place in enumerate(LAYERS)})
        fill(nn.ModuleDict({"layers": head}), tensors)
        super().__init__(nn.ModuleDict({"clip": model, "layers": head}), config)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert isinstance(self.network, nn.ModuleDict)
        values = normalize(image_embeddings(self.network["clip"], images), dim=-1).to(self.dtype)
        for layer in self.network["layers"].children():
            values = layer(values)
        return values[:, 0].float()


def _refuse_first_predictor(tensors: Mapping[str, Tensor], path: str) -> None:
    """Say so if a file holds LAION's first predictor, one linear layer to a number, by whatever names.

    Raises:
        UserError: it does.
    """
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    if len(matrices) != 1 or matrices[0].ndim != 2 or len(matrices[0]) != 1:
        return
    length = matrices[0].shape[1]
    of = f"CLIP {FIRST_OF[length]}'s" if length in FIRST_OF else "an embedding's"
    raise UserError(
        f"{path} is LAION's first aesthetic predictor, one linear layer on {of} {length} numbers; aesthetic is the "
        f"improved one, {IMPROVED}: give that, or leave weights out"
    )
