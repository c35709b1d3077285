"""GenEval without mmdet: transformers' Mask2Former finds the objects, CLIP names their colours.

The rules are in :mod:`~dgpo_plugin.rewards.geneval.rules`; what is the same in finding objects as in the original, and
what is not, in :mod:`~dgpo_plugin.rewards.geneval.mask2former`. Colours are the original's: CLIP ViT-L/14 (OpenAI's),
the object's box cut out with everything outside its mask grey (#999), 224 pixels by open_clip's preprocessing; the
nearest, by cosine, of ten colours, each the mean of three captions' normalised embeddings. The original runs CLIP in
half precision, ours in ``reward.precision``. Flow-GRPO's server gives its detector red and blue exchanged; we do not.

GenEval's published score is the mean over the six task types of the share of pictures that are right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardConfig
from dgpo_plugin.prompts.geneval import COLORS
from dgpo_plugin.rewards.geneval.mask2former import class_names, detect
from dgpo_plugin.rewards.geneval.rules import Detection, kept, partial, read_task, strict
from dgpo_plugin.rewards.networks.base import NeuralReward, from_hub, pretrained
from dgpo_plugin.rewards.networks.pixels import normalised, shortest_to

CAPTIONS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 0x99 / 255


class GenEvalReward(NeuralReward):
    """How much of what GenEval's metadata asks for is in the picture; counts have no gradient.

    Args:
        detector: hub id or folder of a Mask2Former for COCO instances.
        colours: hub id or folder of a CLIP.
        strict: GenEval's verdict, 0 or 1, instead of Flow-GRPO's partial credit, at most 1.

    Attributes:
        find: pictures (N, 3, H, W) in [0, 1] -> the objects in each; another detector can be put here.

    Raises:
        UserError: a network cannot be loaded, or is none of its kind.
    """

    def __init__(
        self,
        config: RewardConfig | None = None,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        colours: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
    ) -> None:
        name = "geneval-strict" if strict else "geneval"
        detector_, colours_ = (
            f"reward {name}: {where} (reward.options.{name}.{option})"
            for option, where in (("detector", detector), ("colours", colours))
        )
        segmenter = pretrained(detector_, Mask2FormerForUniversalSegmentation, detector)
        names = class_names(segmenter.config.id2label, detector_)
        clip = pretrained(colours_, CLIPModel, colours)
        tokenizer = from_hub(f"{colours_}: its tokenizer", lambda: CLIPTokenizer.from_pretrained(colours))
        if len(tokenizer) != clip.config.text_config.vocab_size:  # an empty one, where its files are missing
            raise UserError(f"{colours_}: its tokenizer is missing or not its own; fetch the whole folder")
        networks = nn.ModuleDict({"detector": segmenter, "colours": clip})
        super().__init__(networks, config)
        self.find: Callable[[Tensor], list[list[Detection]]] = lambda images: detect(segmenter, names, images)
        self._clip, self._tokenizer, self._strict = clip, tokenizer, strict
        self._captions: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tasks = [read_task(prompt) for prompt in prompts]
        rule = strict if self._strict else partial
        scores = [
            rule(task, kept(objects, task.tag), functools.partial(self.colours_of, image))
            for task, objects, image in zip(tasks, self.find(images), images, strict=True)
        ]
        return torch.tensor(scores)

    def colours_of(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """The colour of each of several objects, all of one class, in a picture (3, H, W) in [0, 1]."""
        side = self._clip.config.vision_config.image_size
        cut = torch.cat([shortest_to(cut_out(image, found)[None], side, nearest=True) for found in objects])
        embeddings = self._clip.get_image_features(pixel_values=normalised(cut).to(self.dtype)).pooler_output
        nearest = (normalize(embeddings.float(), dim=-1) @ self._embedded(objects[0].name).T).argmax(-1)
        return [COLORS[int(number)] for number in nearest]

    def _embedded(self, name: str) -> Tensor:
        """(colours, width): the directions of an object's ten colours."""
        if name not in self._captions:
            captions = [caption.format(colour=colour, name=name) for colour in COLORS for caption in CAPTIONS]
            tokens = self._tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.device)
            embeddings = normalize(self._clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
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
