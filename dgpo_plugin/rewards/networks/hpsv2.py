"""HPSv2 and HPSv2.1: people's preference as the cosine of a fine-tuned CLIP ViT-H/14 (arXiv 2306.09341).

The published checkpoints are open_clip's; here their tensors fill transformers' CLIPModel.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
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
from dgpo_plugin.rewards.networks.packages import Package, hpsv2_package, pictures, uses_package
from dgpo_plugin.rewards.networks.pixels import longest_to, normalized

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VISION_HEAD, TEXT_HEAD = 80, 64
"""Widths of the attention heads of ViT-H/14: 16 of each, in 1280 and 1024 channels."""

RENAMED = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
PREFIXES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
INSIDE = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


class HPSv2Reward(NeuralReward):
    """Cosine between a picture and its prompt, without CLIP's logit scale: typically 0.2 to 0.35.

    Compare it between pictures of one prompt, not between prompts (its authors). Preprocessing is the original's: the
    whole picture inside a black square; a prompt past the token limit loses its end.

    Args:
        version: ``v2.0`` or ``v2.1``.
        weights: the published checkpoint as a file; None for the hub's.
        tokenizer: CLIP's, by hub id or local folder.
        backend: ``native``, or ``package`` for the installed package ``hpsv2``, which has no gradient.
    """

    def __init__(
        self,
        config: ScoringConfig | None = None,
        *,
        version: str = "v2.1",
        weights: str | None = None,
        tokenizer: str = TOKENIZER,
        backend: str = "native",
    ) -> None:
        self.package: Package | None = None
        if uses_package(backend):
            self.package = hpsv2_package(version, weights)
            super().__init__(nn.Identity(), config)
            return
        tensors = load_published(checkpoint_file(REPOSITORY, FILES[version], weights))
        network = clip_from_open_clip(tensors)
        text = network.config.text_config
        self.side: int = network.config.vision_config.image_size
        self.tokenizer = CLIPText(tokenizer, text.max_position_embeddings, text.eos_token_id)
        super().__init__(network, config)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Cosines (N,) of pictures (N, 3, H, W) in [0, 1] and N prompts."""
        texts = [prompt.text for prompt in prompts]
        if self.package is not None:
            return images.new_tensor(self.package(pictures(images), texts))
        pixels = normalized(longest_to(images, self.side)).to(self.dtype)
        found = self.network(input_ids=self.tokenizer(texts).to(images.device), pixel_values=pixels)
        return cosine_similarity(found.image_embeds.float(), found.text_embeds.float())


class CLIPText:
    """Prompts as open_clip's own tokenizer cuts them up: cleaned, then so many tokens of which the last ends the text.

    Args:
        limit: tokens, the two around the text included.
        last: the one that ends a text.
    """

    def __init__(self, name: str, limit: int, last: int) -> None:
        self.cut = from_hub(f"{name} (option tokenizer)", lambda: AutoTokenizer.from_pretrained(name))
        self.limit = limit
        if self.cut.eos_token_id != last:
            raise UserError(
                f"tokenizer {name} ends texts with token {self.cut.eos_token_id}, the checkpoint with {last}; "
                "give CLIP's"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens (N, longest), filled up with 0: attention is causal, so that nothing after the end is seen."""
        ids = self.cut([clean(text) for text in texts], truncation=True, max_length=self.limit)["input_ids"]
        return pad_sequence([torch.tensor(one) for one in ids], batch_first=True)


def clean(text: str) -> str:
    """A text as open_clip cleans it: encodings, curly quotes and HTML entities mended, white space and case leveled."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def clip_from_open_clip(tensors: Mapping[str, Tensor]) -> CLIPModel:
    """A CLIPModel of the checkpoint's sizes, filled with it.

    Raises:
        UserError: a tensor is missing, left over or of a wrong shape.
    """
    try:
        with no_init_weights():  # which takes longer than reading them
            network = CLIPModel(clip_config(tensors))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"not a checkpoint of HPSv2 (its sizes: {error}); give the published one") from error
    fill(network, from_open_clip(tensors))
    return network


def clip_config(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """CLIP's sizes from the tensors' shapes; what they do not show is as in ViT-H/14: GELU, and the heads' width."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[1],
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": count_layers(tensors, "visual.transformer.resblocks."),
            "num_attention_heads": width // VISION_HEAD,
            "patch_size": patch,
            "image_size": patch * isqrt(len(tensors["visual.positional_embedding"]) - 1),
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": count_layers(tensors, "transformer.resblocks."),
            "num_attention_heads": text_width // TEXT_HEAD,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "hidden_act": "gelu",
            # open_clip reads the text's embedding where the id is highest; that is the end of the text, the last word
            # of the vocabulary.
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
        },
    )


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names, fused projections and (in, out) matrices as transformers has them; other names as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = RENAMED.get(name, name)
        for old, prefix in PREFIXES.items():
            if name.startswith(old):
                new = prefix + name[len(old) :]
        for old, inside in INSIDE.items():
            new = new.replace(old, inside)
        if name in ("text_projection", "visual.proj"):
            found[new] = tensor.T
        elif ".attn.in_proj_" in new:
            layer, kind = new.split(".attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{layer}.self_attn.{part}_proj.{kind}"] = piece
        else:
            found[new] = tensor
    return found
