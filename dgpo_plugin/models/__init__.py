"""Base models: what they all offer, one file for each diffusers family, and the policy that trains one.

The public names are imported on first use: diffusers takes seconds, which whoever only checks a configuration would
wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgpo_plugin.common.on_first_use import on_first_use

if TYPE_CHECKING:
    from dgpo_plugin.models.base import Model
    from dgpo_plugin.models.conditioning import Conditioning
    from dgpo_plugin.models.load import load_model

__all__ = ["Conditioning", "Model", "load_model"]

__getattr__ = on_first_use(
    __name__,
    {
        "Conditioning": "dgpo_plugin.models.conditioning",
        "Model": "dgpo_plugin.models.base",
        "load_model": "dgpo_plugin.models.load",
    },
)
