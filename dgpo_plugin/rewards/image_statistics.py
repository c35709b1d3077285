"""Cheap statistics of pictures that expose reward hacking, and the rewards made of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward

Pictures = NDArray[np.float32]


def sharpness(images: Pictures) -> NDArray[np.float64]:
    """Standard deviation of the brightness's Laplacian, (N,), of pictures (N, 3, H, W) in [0, 1]; a fall is blur.

    The root of the focus measure of Pech-Pacheco et al. ("Diatom autofocusing in brightfield microscopy", ICPR 2000),
    on float pictures: nothing is rounded to 8 bits.
    """
    return np.array([ndimage.laplace(image.mean(0)).std() for image in images], dtype=np.float64)


def color_entropy(images: Pictures) -> NDArray[np.float64]:
    """Bits of the 8 x 8 x 8 RGB histogram, (N,) in [0, 9], of pictures (N, 3, H, W); a fall is a poorer picture."""
    levels = np.minimum((images * 8).astype(int), 7)
    entropies = []
    for red, green, blue in levels:
        share = np.bincount((red * 64 + green * 8 + blue).ravel(), minlength=512) / red.size
        share = share[share > 0]
        entropies.append(float(-(share * np.log2(share)).sum()))
    return np.array(entropies)


def brightness(images: Pictures) -> NDArray[np.float64]:
    """Mean of all channels, (N,) in [0, 1], of pictures (N, 3, H, W); it should stay where the base has it."""
    return np.asarray(images.mean((1, 2, 3), dtype=np.float64))


def jpeg_size(images: Pictures) -> NDArray[np.float64]:
    """Kilobytes (1000 bytes) as a JPEG file of quality 95, (N,), as in DDPO (arXiv 2305.13301)."""
    return np.array([_jpeg_bytes(torch.from_numpy(image)) / 1000 for image in images])


def _jpeg_bytes(image: Tensor) -> int:
    file = io.BytesIO()
    to_image(image).save(file, format="JPEG", quality=95)
    return file.tell()


def group_diversity(groups: Tensor) -> Tensor:
    """Mean root mean square pixel distance of the pairs in each of P groups of pictures, (P, G, 3, H, W): (P,)."""
    flat = groups.flatten(2)
    size = flat.shape[1]
    distances: Tensor = torch.cdist(flat, flat) / flat.shape[2] ** 0.5
    return distances.sum((1, 2)) / (size * (size - 1))


def diversity(groups: Pictures) -> float:
    """Mean over groups (P, G, 3, H, W) of their :func:`group_diversity`."""
    return float(group_diversity(torch.from_numpy(groups)).mean())


STATISTICS: dict[str, Callable[[Pictures], NDArray[np.float64]]] = {
    "sharpness": sharpness,
    "color-entropy": color_entropy,
    "brightness": brightness,
    "jpeg-size": jpeg_size,
}


class Statistic(Reward):
    """One of :data:`STATISTICS` as a reward; the prompts do not matter."""

    def __init__(self, statistic: str) -> None:
        self._of = STATISTICS[statistic]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.from_numpy(self._of(images.cpu().numpy())).float()
