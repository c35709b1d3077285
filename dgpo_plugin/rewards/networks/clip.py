"""How well a picture fits its text, by CLIP models: CLIPScore and PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, CLIPModel

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import NeuralReward, from_hub, pretrained
from dgpo_plugin.rewards.networks.pixels import normalized, shortest_to

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def image_embeddings(model: Any, images: Tensor) -> Tensor:
    """CLIP's embeddings (N, D) of pictures (N, 3, H, W) in [0, 1], by its own preprocessing."""
    pixels = normalized(shortest_to(images, model.config.vision_config.image_size))
    embeddings: Tensor = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output
    return embeddings.float()


def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """CLIP's embeddings (N, D) of N texts, cut where the model's places end."""
    tokens = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(model.device)
    embeddings: Tensor = model.get_text_features(**tokens).pooler_output
    return embeddings.float()


class ClipScore(NeuralReward):
    """Cosine of picture and text, in [-1, 1], usually .15 to .35.

    The paper's number (Hessel et al. 2021, arXiv 2104.08718) is 2.5 max(cosine, 0) of another CLIP model; reward
    papers quote this plain cosine, as we do.

    Args:
        weights, tokenizer: hub id or folder; the tokenizer's is the weights' if not given.
    """

    def __init__(self, config: ScoringConfig | None = None, weights: str = VIT_L, tokenizer: str | None = None) -> None:
        super().__init__(pretrained(CLIPModel, weights), config)
        place = tokenizer or weights
        self.tokenizer: Any = from_hub(f"{place} (option tokenizer)", lambda: AutoTokenizer.from_pretrained(place))

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        return cosine_similarity(
            image_embeddings(self.network, images), text_embeddings(self.network, self.tokenizer, texts)
        )


class PickScore(ClipScore):
    """exp(logit_scale) x cosine (Kirstain et al. 2023, arXiv 2305.01569), usually 20 to 24.

    Args:
        divisor: 1 for the published scale; Flow-GRPO and DGPO train on the score divided by 26.
    """

    def __init__(
        self,
        config: ScoringConfig | None = None,
        weights: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = VIT_H,
        divisor: float = 1.0,
    ) -> None:
        super().__init__(config, weights, tokenizer)
        self.divisor = divisor

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        network: Any = self.network
        scale: Tensor = network.logit_scale.exp().float() / self.divisor
        return scale * super().score(images, prompts)
