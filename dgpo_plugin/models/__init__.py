"""Base models: what they all offer, one file for each diffusers family, and the policy that trains one.

The public names are imported on first use: diffusers takes seconds, which whoever only checks a configuration would
wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo_plugin.models.base import Model
    from dgpo_plugin.models.conditioning import Conditioning
    from dgpo_plugin.models.load import load_model

_PUBLIC = {
    "Conditioning": "dgpo_plugin.models.conditioning",
    "Model": "dgpo_plugin.models.base",
    "load_model": "dgpo_plugin.models.load",
}
__all__ = ["Conditioning", "Model", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
