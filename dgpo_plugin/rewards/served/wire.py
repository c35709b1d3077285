"""What both sides of a wire need: tokens out of the environment, addresses of this machine, pictures as PNG."""

from __future__ import annotations

import base64
import io
import os
from ipaddress import ip_address

import numpy as np
from PIL import Image
from torch import Tensor

from dgpo_plugin.common.errors import UserError


def secret(where: str, variable: str | None) -> str | None:
    """What the environment variable holds, so that no configuration file ever does; None if none is named.

    Raises:
        UserError: not set, or not fit for a header.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "")
    if not value:
        raise UserError(f"{where}: the environment variable {variable} is not set; export it first")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise UserError(f"{where}: the environment variable {variable} may hold letters, digits and signs only")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it; names other than localhost are taken to be outside."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def as_png(image: Tensor) -> str:
    """One picture (3, H, W) in [0, 1] as 8-bit PNG in base64.

    Raises:
        UserError: it holds a value that is not finite.
    """
    if not image.isfinite().all():
        raise UserError("a picture holds values that are not finite; the model that drew it has diverged")
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    out = io.BytesIO()
    # Measured on a noisy 512 px picture against Pillow's default level: 1.6 times as fast, 13 % more bytes.
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, format="PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()
