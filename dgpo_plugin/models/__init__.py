"""One file a diffusers family; the only place that knows a pipeline class."""

from dgpo_plugin.models.base import Model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.load import load_model

__all__ = ["Conditioning", "Model", "load_model"]
