"""What the original packages miss beside current libraries; imported before them, in their own environment only.

Nothing here touches what they compute: missing imports of parts that scoring does not use, names that transformers has
moved, and the base class's helpers as they were in transformers 4.15, which ImageReward was written for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def install_torchvision() -> None:
    """torchvision from the index is linked to CUDA: on a CPU build of torch its operators need a declaration."""
    try:
        import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


KEPT: list[Any] = []
"""A library's declarations end with it."""


def install_unused() -> None:
    """OpenAI's package, which ImageReward imports for scores other than its own, and its own part that trains."""
    for name in ("clip", "ImageReward.ReFL"):
        sys.modules[name] = ModuleType(name)


def install_transformers() -> None:
    """Names that ImageReward's copy of BERT takes from transformers."""
    from transformers import BertTokenizer, modeling_utils, pytorch_utils

    def unused(*_: object, **__: object) -> None:
        raise NotImplementedError("pruning is no part of scoring")

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(modeling_utils, name, getattr(pytorch_utils, name, unused))

    def invert_attention_mask(self: Any, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * -10000.0

    def get_head_mask(self: Any, mask: None, layers: int) -> list[None]:
        return [None] * layers

    model = modeling_utils.PreTrainedModel
    model.invert_attention_mask = invert_attention_mask
    model.get_head_mask = get_head_mask
    model.all_tied_weights_keys = {}
    BertTokenizer.additional_special_tokens_ids = property(lambda self: [self.convert_tokens_to_ids("[ENC]")])


install_torchvision()
install_unused()
install_transformers()
