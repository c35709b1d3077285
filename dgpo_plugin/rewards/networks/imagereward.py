"""ImageReward: people's preference as BLIP reads a picture and its prompt together (arXiv 2304.05977).

The tensors of the published checkpoint fill transformers' BlipVisionModel and BlipTextModel and a small head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.initialization import no_init_weights

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.networks.base import (
    NeuralReward,
    checkpoint_file,
    count_layers,
    fill,
    from_hub,
    load_published,
)
from dgpo_plugin.rewards.networks.packages import Package, imagereward_package, pictures, uses_package
from dgpo_plugin.rewards.networks.pixels import normalized, shortest_to

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35
"""All that is read of a prompt, padding to it included."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on its authors' data."""
HEAD = 64
"""Width of an attention head, in both encoders."""

PREFIXES = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
}
INSIDE = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""In the checkpoint, and no part of the score: BLIP's contrastive projections, and a counter."""


class ImageReward(NeuralReward):
    """ImageReward's score, roughly normal with mean 0 and deviation 1 over its authors' pictures.

    Preprocessing is the original's: the middle square; 35 tokens of the prompt, and no more.

    Args:
        weights: the published checkpoint as a file; None for the hub's.
        tokenizer: BERT's (uncased), by hub id or local folder.
        backend: ``native``, or ``package`` for the installed package ``image-reward``, which has no gradient.
    """

    def __init__(
        self,
        config: ScoringConfig | None = None,
        *,
        weights: str | None = None,
        tokenizer: str = TOKENIZER,
        backend: str = "native",
    ) -> None:
        self.package: Package | None = None
        if uses_package(backend):
            self.package = imagereward_package(weights)
            super().__init__(nn.Identity(), config)
            return
        network = BlipScore(load_published(checkpoint_file(REPOSITORY, FILE, weights)))
        self.tokenizer = from_hub(f"{tokenizer} (option tokenizer)", lambda: AutoTokenizer.from_pretrained(tokenizer))
        words = network.text.config.vocab_size
        if len(self.tokenizer) > words:
            raise UserError(f"tokenizer {tokenizer} has {len(self.tokenizer)} words, the checkpoint {words}")
        self.side: int = network.vision.config.image_size
        super().__init__(network, config)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (N,) of pictures (N, 3, H, W) in [0, 1] and N prompts."""
        texts = [prompt.text for prompt in prompts]
        if self.package is not None:
            return images.new_tensor(self.package(pictures(images), texts))
        cut = self.tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        pixels = normalized(shortest_to(images, self.side, nearest=True)).to(self.dtype)
        raw: Tensor = self.network(pixels, cut["input_ids"].to(images.device), cut["attention_mask"].to(images.device))
        return (raw.float() - MEAN) / STD


class BlipScore(nn.Module):
    """BLIP's image encoder, its text encoder that looks at the picture, and linear layers down to one number.

    Args:
        tensors: the checkpoint, from whose shapes the sizes are taken.

    Raises:
        UserError: a tensor is missing, left over or of a wrong shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            with no_init_weights():  # which takes longer than reading them
                self.vision = BlipVisionModel(vision_config(tensors))
                self.text = BlipTextModel(text_config(tensors), add_pooling_layer=False)
            places = [name.split(".")[2] for name in tensors if name.startswith("mlp.layers.") and "weight" in name]
            # Between them stood dropout, hence the gaps in the names; there was never an activation.
            shapes = {place: tensors[f"mlp.layers.{place}.weight"].shape for place in sorted(places, key=int)}
            self.head = nn.Sequential()
            for place, (wide, narrow) in shapes.items():
                self.head.add_module(place, nn.Linear(narrow, wide))
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"not a checkpoint of ImageReward (its sizes: {error}); give the published one") from error
        fill(self, from_imagereward(tensors))

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (N,) of normalised pictures (N, 3, side, side), tokens (N, 35) and their mask (N, 35)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=words, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        raw: Tensor = self.head(read[:, 0]).squeeze(-1)
        return raw


def vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Sizes of the image encoder, from the tensors' shapes."""
    width, _, patch, _ = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=count_layers(tensors, "blip.visual_encoder.blocks."),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=patch * isqrt(tensors["blip.visual_encoder.pos_embed"].shape[1] - 1),
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def text_config(tensors: Mapping[str, Tensor]) -> BlipTextConfig:
    """Sizes of the text encoder, from the tensors' shapes; ``is_decoder`` makes room for attention to the picture."""
    words, width = tensors["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    layer = "blip.text_encoder.encoder.layer."
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=tensors[f"{layer}0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors[f"{layer}0.intermediate.dense.bias"]),
        num_hidden_layers=count_layers(tensors, layer),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(tensors["blip.text_encoder.embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,
        bos_token_id=None,
    )


def from_imagereward(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's names as transformers has them; unknown names as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            continue
        new = name
        for old, prefix in PREFIXES.items():
            if name.startswith(old):
                new = prefix + name[len(old) :]
        for old, inside in INSIDE.items():
            new = new.replace(old, inside)
        found[new] = tensor
    return found
