"""The original packages as backends, where a user has them installed: one picture after the other, no gradient."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.pictures import to_image

Package = Callable[[Sequence[Image], Sequence[str]], list[float]]
"""Pictures and as many prompts -> a score each."""


def uses_package(backend: str) -> bool:
    """Whether the option ``backend`` asks for the package.

    Raises:
        UserError: it is neither of the two.
    """
    if backend not in ("native", "package"):
        raise UserError(f"backend {backend!r} is neither native nor package")
    return backend == "package"


def pictures(images: Tensor) -> list[Image]:
    """Pictures (N, 3, H, W) in [0, 1] as 8-bit ones."""
    return [to_image(image) for image in images.detach().clamp(0, 1)]


def hpsv2_package(version: str, weights: str | None) -> Package:
    """The package ``hpsv2``, which loads its weights anew for each call; so a call takes all pictures of a prompt.

    Raises:
        UserError: not installed, or it cannot be imported.
    """
    package = _imported("hpsv2.img_score", "hpsv2")

    def scores(images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        found: dict[int, float] = {}
        for text in dict.fromkeys(texts):
            places = [place for place, other in enumerate(texts) if other == text]
            values = package.score([images[place] for place in places], text, cp=weights, hps_version=version)
            found |= zip(places, map(float, values), strict=True)
        return [found[place] for place in range(len(texts))]

    return scores


def imagereward_package(weights: str | None) -> Package:
    """The package ``image-reward``, loaded once.

    Args:
        weights: its checkpoint, with ``med_config.json`` in the same folder; None for the hub's.

    Raises:
        UserError: not installed, or it cannot be imported or loaded.
    """
    package = _imported("ImageReward", "image-reward")
    beside = {} if weights is None else {"name": weights, "med_config": str(Path(weights).with_name("med_config.json"))}
    try:
        model = package.load(**beside)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the package image-reward cannot load its weights ({error})") from error
    return lambda images, texts: [float(model.score(t, i)) for i, t in zip(images, texts, strict=True)]


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # these packages fail in many ways beside current libraries
        raise UserError(
            f"backend package needs {package} ({type(error).__name__}: {error}); "
            f"pip install {package} in an environment that it works in, or take backend: native"
        ) from error
