"""Rendered words read back: rapidocr, whose models are in its package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.functional import interpolate

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward, problems

LEAST_SIDE = 128
"""Pixels; smaller pictures are enlarged to it, as small words are not found otherwise."""
SETTINGS = {
    "Global.use_cls": False,
    "Global.log_level": "error",
    "Det.limit_type": "min",
    "Det.limit_side_len": LEAST_SIDE,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
}


class OcrReward(Reward):
    """How well the words asked for are read: 1 - edit distance / length, in [0, 1], as in Flow-GRPO's reward.

    Both texts lose their spaces and their case; where the words asked for stand whole in what is read, the distance is
    0, whatever else is there. The words come from ``metadata["text"]``, else from between the prompt's double quotes.
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        self._engine: Any = RapidOCR(params=SETTINGS)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        wanted = [requested_text(prompt) for prompt in prompts]
        return images.new_tensor(
            [closeness(self.read(image), text) for image, text in zip(images, wanted, strict=True)]
        )

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, requested_text)

    def read(self, image: Tensor) -> str:
        """Everything found in one picture (3, H, W), in the reader's order."""
        smallest = min(image.shape[1:])
        if smallest < LEAST_SIDE:
            image = interpolate(image[None], scale_factor=LEAST_SIDE / smallest, mode="bicubic")[0].clamp(0, 1)
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        found = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))  # blue first
        return "".join(found.txts or ())


def requested_text(prompt: Prompt) -> str:
    """The words that a prompt asks for.

    Raises:
        UserError: it asks for none.
    """
    given = prompt.metadata.get("text")
    quoted = re.search(r'"([^"]+)"', prompt.text)
    text = given if isinstance(given, str) else quoted.group(1) if quoted else ""
    if not _bare(text):
        raise UserError(f'prompt {prompt.text!r} asks for no words; put them in "double quotes"')
    return text


def closeness(read: str, wanted: str) -> float:
    """How near a text is to the wanted one: 1 - edit distance / length, at least 0."""
    read, wanted = _bare(read), _bare(wanted)
    if wanted in read:
        return 1.0
    return max(0.0, 1 - edit_distance(read, wanted) / len(wanted))


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that make one text the other (Levenshtein)."""
    return Levenshtein.distance(a, b)
