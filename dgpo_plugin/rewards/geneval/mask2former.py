"""Objects in pictures: transformers' Mask2Former for instances, with pre- and post-processing on tensors.

transformers' own processor wants torchvision, and the hub folders' settings squeeze every picture to 384 x 384. So both
are written here, with the numbers that GenEval runs its detector with (mmdet 2.27, configuration
``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py``):

- in: 8-bit RGB, the shorter side to 800 pixels, but the longer to 1333 at most, bilinear without antialiasing, rounded
  to 8 bits; grey (128) at the right and bottom to multiples of 32; minus the ImageNet mean, over its deviation;
- out: of all queries x classes the 100 most probable (softmax, the no-object class left out); mask logits bilinearly
  to the padded size, cut to the picture, bilinearly to the picture's own size; mask: logit > 0; score: class
  probability x the mean of sigmoid(logit) over the mask; box: from the mask's first row and column to past its last.

What differs from GenEval's is the weights: the hub's are those that Mask2Former's authors trained, GenEval's are of
mmdet's own training of the same network, so single detections near a threshold fall otherwise. No mmdet is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.prompts.geneval import OBJECTS
from dgpo_plugin.rewards.geneval.rules import THRESHOLD, Detection
from dgpo_plugin.rewards.networks.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized

SHORTEST, LONGEST, MULTIPLE = 800, 1333, 32
PADDING = 128
MOST_INSTANCES = 100
OTHER_SPELLINGS = {
    # COCO's, where GenEval says more
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Pascal's, which some converted checkpoints have
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def class_names(labels: Mapping[int, str]) -> list[str]:
    """A model's labels in GenEval's spelling, by number.

    Raises:
        UserError: not COCO's 80 classes.
    """
    names = [OTHER_SPELLINGS.get(labels[number], labels[number]) for number in sorted(labels)]
    missing = [name for name in OBJECTS if name not in names]
    if missing or len(names) != len(OBJECTS):
        lacks = f", lacks {len(missing)} of COCO's 80 (first: {missing[0]})" if missing else ""
        raise UserError(f"has {len(names)} classes{lacks}; give a Mask2Former for COCO instances")
    return names


def detector_size(height: int, width: int) -> tuple[int, int]:
    """The size that a picture is brought to: shorter side 800, longer at most 1333."""
    scale = min(SHORTEST / min(height, width), LONGEST / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepared(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] as the network takes them: resized to ``size``, padded, normalised."""
    pixels = (images.float() * 255).round().clamp(0, 255)
    resized = interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    padded = pad(resized, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE), value=PADDING)
    return normalized(padded / 255, IMAGENET_MEAN, IMAGENET_STD)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    names: list[str],
    size: tuple[int, int],
    picture: tuple[int, int],
    least: float = THRESHOLD,
) -> list[Detection]:
    """What one picture's queries found.

    Args:
        class_logits: (Q, classes + 1), the last for no object.
        mask_logits: (Q, h, w) of the padded picture.
        size, picture: (height, width) of what the network saw without its padding, and of the picture itself.
        least: detections with a score of at most this are left out.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    likely, index = probabilities.flatten().topk(min(MOST_INSTANCES, probabilities.numel()))
    # The mask's factor is at most 1: the others' masks need not be computed.
    likely, index = likely[likely > least], index[likely > least]
    if not len(index):
        return []
    masks = mask_logits[index // len(names)].float()[None]
    padded = tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in size)
    masks = interpolate(masks, padded, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]
    masks = interpolate(masks, picture, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    scores = likely * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return [
        Detection(names[int(number) % len(names)], float(score), _box(mask), mask)
        for number, score, mask in zip(index, scores, inside, strict=True)
        if score > least
    ]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """The box around a mask (H, W) with at least one pixel: left, top, right, bottom."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)


def detect(network: nn.Module, names: list[str], images: Tensor) -> list[list[Detection]]:
    """The objects in each of several pictures (N, 3, H, W) in [0, 1], on the network's device."""
    network_: Any = network
    height, width = images.shape[2:]
    size = detector_size(height, width)
    out = network_(pixel_values=prepared(images, size).to(network_.dtype), output_auxiliary_logits=False)
    return [
        instances(class_logits, mask_logits, names, size, (height, width))
        for class_logits, mask_logits in zip(out.class_queries_logits, out.masks_queries_logits, strict=True)
    ]
