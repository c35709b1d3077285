"""Text found in pictures and read: rapidocr's networks, with the sizes and the order of lines that drawn words need."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from dgpo_plugin.common.errors import UserError, did_you_mean, in_one_line

LEAST_SIDE = 96
"""Pixels; smaller pictures are enlarged to it, as small words are not found otherwise."""
DETECTED_AREA = 640 * 640
"""Pixels of a picture that the detector sees at once; among more of them it overlooks a small text."""
TILE, STEP = 640, 512
"""Pixels of the pieces that larger pictures are looked through in, and from one to the next."""
FLAT = 16
"""Of 255, between the darkest and the brightest value of a piece; in an empty one the detector sees text everywhere."""
GRID = 32
"""Pixels; the sides of what the detector is given are whole multiples."""
UPRIGHT = 1.5
"""Height by width from which a box is taken for a line that runs down, unless it reads better as it stands."""
DASHES = ("一", "—", "–", "-", "_")
LEAST_SCORE = 0.5
"""Mean confidence of a line's characters; what is read with less is no text."""
SETTINGS = {
    "Global.use_cls": False,
    "Global.log_level": "error",
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    # Lines are padded to this width, and not to one another: as much is read as with 320, in half the time.
    "Rec.rec_img_shape": [3, 48, 160],
    "Rec.rec_batch_num": 1,
}
Pixels = NDArray[np.uint8]
"""(H, W, 3), blue first."""


class TextReader:
    """Reads the text in pictures.

    Args:
        lang: the language or script, by rapidocr's name; empty for the model in rapidocr's package.

    Attributes:
        characters: all that can be read.

    Raises:
        UserError: there is no model for it, or it cannot be fetched.
    """

    def __init__(self, lang: str = "") -> None:
        from rapidocr import RapidOCR

        self._engine: Any = RapidOCR(params={**SETTINGS, **_model(lang)})
        blank = np.full((64, 64, 3), 255, np.uint8)
        try:  # its networks are loaded by a first call
            self._engine(blank, use_det=True, use_rec=False)
            self._engine(blank, use_det=False, use_rec=True)
        except Exception as error:  # whatever the download raises
            raise UserError(
                f"lang {lang}: its model could not be loaded ({in_one_line(error)}); it is fetched on first use, into "
                "the folder models of the package rapidocr"
            ) from error
        self.characters = frozenset("".join(self._engine.text_rec.postprocess_op.character[1:]))  # the first is CTC's

    def read(self, image: Tensor) -> list[str]:
        """Everything that stands in a picture: read row by row, and, if there are columns, column by column.

        Args:
            image: (3, H, W), values in [0, 1].
        """
        smallest = min(image.shape[1:])
        if smallest < LEAST_SIDE:
            image = interpolate(image[None], scale_factor=LEAST_SIDE / smallest, mode="bicubic")[0].clamp(0, 1)
        pixels = np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy()[:, :, ::-1])
        boxes = self._boxes(pixels)
        crops = self._engine.crop_text_regions(pixels, boxes)
        texts = [self._line(crop, box) for crop, box in zip(crops, boxes, strict=True)]
        found = [(box, text) for box, text in zip(boxes, texts, strict=True) if text]
        orders = reading_orders(np.array([box for box, _ in found]).reshape(-1, 4, 2))
        return ["".join(found[at][1] for at in order) for order in orders]

    def _boxes(self, pixels: Pixels) -> NDArray[np.float32]:
        """Corners (n, 4, 2) of the lines, from the upper left one on, clockwise."""
        height, width = pixels.shape[:2]
        smaller = min(1.0, (DETECTED_AREA / (height * width)) ** 0.5)
        seen = self._text_map(pixels, smaller)
        post_process = self._engine.text_det.postprocess_op
        boxes, _ = post_process(seen[None, None], (height, width))
        if smaller < 1 and (smaller < 0.5 or not len(boxes)):
            overview = cv2.resize(seen, (width, height))
            boxes, _ = post_process(np.maximum(overview, self._map_in_tiles(pixels))[None, None], (height, width))
        return np.asarray(boxes, np.float32).reshape(-1, 4, 2)

    def _map_in_tiles(self, pixels: Pixels) -> NDArray[np.float32]:
        """How much text stands at each pixel (H, W), looked at in pieces that overlap."""
        height, width = pixels.shape[:2]
        whole = np.zeros((height, width), np.float32)
        for top in range(0, max(1, height - TILE + STEP), STEP):
            for left in range(0, max(1, width - TILE + STEP), STEP):
                tile = pixels[top : top + TILE, left : left + TILE]
                if np.ptp(tile) < FLAT:
                    continue
                seen = cv2.resize(self._text_map(tile, 1.0), tile.shape[1::-1])
                part = whole[top : top + TILE, left : left + TILE]
                np.maximum(part, seen, out=part)
        return whole

    def _text_map(self, pixels: Pixels, scale: float) -> NDArray[np.float32]:
        """The detector's probability of text, at the scale, its sides rounded to the grid."""
        height, width = (max(GRID, round(side * scale / GRID) * GRID) for side in pixels.shape[:2])
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(pixels, (width, height), interpolation=way)
        prepared = ((resized.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
        seen: NDArray[np.float32] = self._engine.text_det.session(prepared)[0, 0]
        return seen

    def _line(self, crop: Pixels, box: NDArray[np.float32]) -> str:
        """What stands in a line; empty if it is most likely no text."""
        from rapidocr.ch_ppocr_rec import TextRecInput

        width, height = np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[3] - box[0])
        lines = [crop]
        if height >= UPRIGHT * width:  # the crop has been laid down, which makes a dash of a single I
            lines.append(np.ascontiguousarray(np.rot90(crop, -1)))
        read = self._engine.text_rec(TextRecInput(img=lines))
        found = [(score, text.strip()) for score, text in zip(read.scores, read.txts, strict=True)]
        score, text = max((line for line in found if len(found) == 1 or line[1] not in DASHES), default=(0.0, ""))
        return str(text) if score >= LEAST_SCORE else ""


@functools.cache
def reader_of(lang: str) -> TextReader:
    """The reader of a language, loaded once a process: it keeps nothing of what it has read, so all may use one.

    Raises:
        UserError: as :class:`TextReader`.
    """
    return TextReader(lang)


def reading_orders(boxes: NDArray[np.float32]) -> list[list[int]]:
    """Orders to read lines in: row by row; and column by column, where there are several of both.

    Boxes are in one row where they overlap by half of the lower one's height, along the slant that they have in common.

    Args:
        boxes: (n, 4, 2) corners (x, y), from the upper left one on, clockwise.
    """
    if not len(boxes):
        return [[]]
    along = boxes[:, 1] - boxes[:, 0]
    slant = float(np.median(np.arctan2(along[:, 1], along[:, 0])))
    cosine, sine = np.cos(slant), np.sin(slant)
    x, y = (boxes @ np.array([[cosine, -sine], [sine, cosine]])).transpose(2, 0, 1)
    rows = _bands(y[:, :2].mean(1), y[:, 2:].mean(1))
    columns = _bands(x[:, [0, 3]].mean(1), x[:, [1, 2]].mean(1))
    orders = [[at for row in rows for at in sorted(row, key=lambda at: x[at].mean())]]
    if len(rows) > 1 < len(columns):
        orders.append([at for column in columns for at in sorted(column, key=lambda at: y[at].mean())])
    return orders


def _bands(low: NDArray[np.float32], high: NDArray[np.float32]) -> list[list[int]]:
    """Intervals put together where they overlap by half of the shorter one, and these groups in their order."""
    bands: list[list[int]] = []
    for at in np.argsort(low + high, kind="stable").tolist():
        for band in bands:
            start, end = low[band].mean(), high[band].mean()
            overlap = min(end, high[at]) - max(start, low[at])
            if overlap >= 0.5 * min(end - start, high[at] - low[at]):
                band.append(at)
                break
        else:
            bands.append([at])
    return sorted(bands, key=lambda band: (low[band] + high[band]).mean())


def _model(lang: str) -> dict[str, Any]:
    """The settings of the recognizer for a language."""
    from rapidocr import ModelType, OCRVersion, RapidOCR

    known: dict[str, dict[str, Any]] = {}
    for version, kind in ((OCRVersion.PPOCRV6, ModelType.SMALL), (OCRVersion.PPOCRV5, ModelType.MOBILE)):
        for name in RapidOCR.list_supported_langs("rec", version.value, kind.value):
            known.setdefault(name, {"Rec.ocr_version": version, "Rec.model_type": kind, "Rec.lang_type": name})
    if lang and lang not in known:
        raise UserError(f"no lang {lang!r}{did_you_mean(str(lang), known)}")
    return known[lang] if lang else {}
