"""The configuration: what its fields are, how files become one, what is said of a mistake. Free of torch."""

from dgpo_plugin.config.fields import AlgorithmConfig, LoraConfig, ModelConfig, RewardTerm, RunConfig, ScoringConfig
from dgpo_plugin.config.load import load_config, parse_config, preset_names

__all__ = [
    "AlgorithmConfig",
    "LoraConfig",
    "ModelConfig",
    "RewardTerm",
    "RunConfig",
    "ScoringConfig",
    "load_config",
    "parse_config",
    "preset_names",
]
