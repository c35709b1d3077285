"""Pictures as tensors made into images that can be saved."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor


def to_image(image: Tensor) -> Image.Image:
    """An image of one picture, (3, H, W) in [0, 1], with 8 bits a channel."""
    return image_grid(image[None], columns=1)


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """An image of pictures (N, 3, H, W) in [0, 1], row by row on white, ``gap`` pixels apart."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
