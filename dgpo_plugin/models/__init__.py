"""Base models: what they all offer, one file for each diffusers family, and the policy that trains one."""

from dgpo_plugin.models.base import Model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.load import load_model

__all__ = ["Conditioning", "Model", "load_model"]
