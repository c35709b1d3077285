"""The adapter file: saved with its card, read once, applied at the scale it means."""

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import AdapterFile, apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter

__all__ = ["AdapterCard", "AdapterFile", "TrainingFacts", "apply_adapter", "export_adapter", "read_adapter"]
