"""GenEval without mmdet: transformers' Mask2Former finds the objects, CLIP names their colors.

The rules are in :mod:`~dgpo_plugin.rewards.geneval.rules`; what is the same in finding objects as in the original, and
what is not, in :mod:`~dgpo_plugin.rewards.geneval.mask2former`. Colors are the original's: CLIP ViT-L/14 (OpenAI's),
the object's box cut out with everything outside its mask grey (#999), 224 pixels by open_clip's preprocessing; the
nearest, by cosine, of ten colors, each the mean of three captions' normalised embeddings. The original runs CLIP in
half precision, ours in ``scoring.precision``. Flow-GRPO's server gives its detector red and blue exchanged; we do not.

GenEval's published score is the mean over the six task types of the share of pictures that are right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.prompts.geneval import COLORS
from dgpo_plugin.rewards.base import problems
from dgpo_plugin.rewards.geneval.mask2former import class_names, detect
from dgpo_plugin.rewards.geneval.rules import Detection, kept, partial, read_task, strict
from dgpo_plugin.rewards.networks.base import NeuralReward, from_hub, pretrained
from dgpo_plugin.rewards.networks.pixels import normalised, shortest_to

CAPTIONS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99 / 255


class GenEvalReward(NeuralReward):
    """How much of what GenEval's metadata asks for is in the picture; counts have no gradient.

    Args:
        detector: hub id or folder of a Mask2Former for COCO instances.
        colors: hub id or folder of a CLIP.
        strict: GenEval's verdict, 0 or 1, instead of Flow-GRPO's partial credit, at most 1.

    Attributes:
        find: pictures (N, 3, H, W) in [0, 1] -> the objects in each; another detector can be put here.

    Raises:
        UserError: a network cannot be loaded, or is none of its kind.
    """

    def __init__(
        self,
        config: ScoringConfig | None = None,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        colors: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
    ) -> None:
        segmenter = pretrained(Mask2FormerForUniversalSegmentation, detector, "detector")
        with prefixed(f"{detector} (option detector)"):
            names = class_names(segmenter.config.id2label)
        clip = pretrained(CLIPModel, colors, "colors")
        tokenizer = from_hub(
            f"the tokenizer of {colors} (option colors)", lambda: CLIPTokenizer.from_pretrained(colors)
        )
        if len(tokenizer) != clip.config.text_config.vocab_size:  # an empty one, where its files are missing
            raise UserError(
                f"{colors} (option colors): its tokenizer is missing or not its own; fetch the whole folder"
            )
        networks = nn.ModuleDict({"detector": segmenter, "colors": clip})
        super().__init__(networks, config)
        self.find: Callable[[Tensor], list[list[Detection]]] = lambda images: detect(segmenter, names, images)
        self.clip, self._tokenizer, self._strict = clip, tokenizer, strict
        self._captions: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tasks = [read_task(prompt) for prompt in prompts]
        rule = strict if self._strict else partial
        scores = [
            rule(task, kept(objects, task.tag), functools.partial(self.colors_of, image))
            for task, objects, image in zip(tasks, self.find(images), images, strict=True)
        ]
        return torch.tensor(scores)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, read_task)

    def colors_of(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """The color of each of several objects, all of one class, in a picture (3, H, W) in [0, 1]."""
        side = self.clip.config.vision_config.image_size
        cut = torch.cat([shortest_to(cut_out(image, found)[None], side, nearest=True) for found in objects])
        embeddings = self.clip.get_image_features(pixel_values=normalised(cut).to(self.dtype)).pooler_output
        nearest = (normalize(embeddings.float(), dim=-1) @ self._embedded(objects[0].name).T).argmax(-1)
        return [COLORS[int(number)] for number in nearest]

    def _embedded(self, name: str) -> Tensor:
        """(colors, width): the directions of an object's ten colors."""
        if name not in self._captions:
            captions = [caption.format(color=color, name=name) for color in COLORS for caption in CAPTIONS]
            tokens = self._tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.device)
            embeddings = normalize(self.clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
            means = embeddings.unflatten(0, (len(COLORS), len(CAPTIONS))).mean(1)
            self._captions[name] = normalize(means, dim=-1).cpu()
        return self._captions[name].to(self.device)


def cut_out(image: Tensor, found: Detection) -> Tensor:
    """An object's box (3, h, w) from a picture (3, H, W), what is outside its mask grey; at least one pixel."""
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, GREY)
    height, width = image.shape[1:]
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
