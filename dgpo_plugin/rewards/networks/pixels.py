"""Pictures as the published rewards see them: 8-bit, then resized as the original did, with a gradient all the same.

Most of them let Pillow's bicubic filter make 8-bit pictures of 8-bit pictures. Ours are tensors, and may need a
gradient; so values are Pillow's, and the gradient is that of torch's antialiased bicubic filter. HPSv2 resizes by that
filter itself, after the division by 255.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def levels(images: Tensor) -> Tensor:
    """Pictures from [0, 1] to whole numbers in [0, 255], as floats, without a gradient."""
    return (images.detach() * 255).round_().clamp_(0, 255)  # in place: most of the time was fresh memory


def eight_bit(images: Tensor) -> Tensor:
    """Pictures rounded to multiples of 1/255, with the gradient of the identity."""
    values = levels(images).div_(255)
    return images + (values - images).detach() if images.requires_grad else values


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] resized to (N, 3, height, width), rounded to 8 bits as Pillow does."""
    if images.shape[2:] == (height, width):
        return eight_bit(images)
    pixels = levels(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    filtered = [Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC) for picture in pixels]
    stacked = np.stack([np.asarray(picture) for picture in filtered])
    values = torch.from_numpy(stacked).permute(0, 3, 1, 2).to(images.device, torch.float32) / 255
    if not images.requires_grad:
        return values
    smooth = interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return smooth + (values - smooth).detach()


def shortest_to(images: Tensor, side: int, *, nearest: bool = False) -> Tensor:
    """Pictures with the shorter side resized to ``side``, then the middle square: CLIP's own preprocessing.

    Args:
        nearest: see :func:`middle_square`.
    """
    tall, wide, top, left = middle_square(images.shape[2], images.shape[3], side, nearest=nearest)
    return resized(images, tall, wide)[:, :, top : top + side, left : left + side]


def middle_square(height: int, width: int, side: int, *, nearest: bool) -> tuple[int, int, int, int]:
    """Height and width of the resized picture, and the row and column where its middle square begins.

    The longer side is cut off to whole pixels, as torchvision and transformers do.

    Args:
        nearest: half a pixel of offset goes to the nearest even one, as in torchvision, which open_clip and the
            packages of OpenAI's CLIP and ImageReward crop with; else down, as in transformers.
    """
    shorter = min(height, width)
    tall, wide = side * height // shorter, side * width // shorter
    rounded = round if nearest else math.floor
    return tall, wide, rounded((tall - side) / 2), rounded((wide - side) / 2)


def longest_to(images: Tensor, side: int) -> Tensor:
    """Pictures in a black square of ``side``, their longer side: HPSv2's preprocessing, with current torchvision.

    Resized in float32 and not rounded again, so values may leave [0, 1] a little beside sharp edges.
    """
    height, width = images.shape[2:]
    scale = side / max(height, width)
    tall, wide = round(height * scale), round(width * scale)
    images = eight_bit(images)
    if scale != 1:
        images = interpolate(images, (tall, wide), mode="bicubic", antialias=True, align_corners=False)
    above, left = (side - tall) // 2, (side - wide) // 2
    return pad(images, (left, side - wide - left, above, side - tall - above))


def normalized(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """The pixels less the mean, divided by the standard deviation, each a value per channel."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
