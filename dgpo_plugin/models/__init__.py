"""One file a diffusers family; the only place that knows a pipeline class."""

from dgpo_plugin.models.base import Model, load_model
from dgpo_plugin.models.conditioning import Conditioning

__all__ = ["Conditioning", "Model", "load_model"]
