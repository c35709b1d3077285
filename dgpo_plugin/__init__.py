"""Fine-tune text-to-image models with a reward.

The public names are imported on first use, so that ``import dgpo_plugin`` costs nothing.
"""

from __future__ import annotations

from dgpo_plugin.common.on_first_use import on_first_use

__version__ = "0.1.0"

_PUBLIC = {
    "Prompt": "dgpo_plugin.common.prompt",
    "RunConfig": "dgpo_plugin.config",
    "Trainer": "dgpo_plugin.training.trainer",
    "UserError": "dgpo_plugin.common.errors",
    "apply_adapter": "dgpo_plugin.adapters",
    "build_trainer": "dgpo_plugin.training.build",
    "generate": "dgpo_plugin.models.generate",
    "load_config": "dgpo_plugin.config",
    "load_model": "dgpo_plugin.models",
    "load_prompts": "dgpo_plugin.prompts",
    "load_reward": "dgpo_plugin.rewards",
    "read_adapter": "dgpo_plugin.adapters",
    "resume": "dgpo_plugin.training.run",
    "train": "dgpo_plugin.training.run",
}
__all__ = [*_PUBLIC, "__version__"]

__getattr__ = on_first_use(__name__, _PUBLIC)
