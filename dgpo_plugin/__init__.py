"""Fine-tune text-to-image models with a reward.

The public names are imported on first use, so that ``import dgpo_plugin`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "dgpo_plugin.config.fields",
    "load_config": "dgpo_plugin.config.load",
    "Prompt": "dgpo_plugin.common.prompt",
    "read_prompts": "dgpo_plugin.prompts.files",
    "Trainer": "dgpo_plugin.training.trainer",
    "apply_adapter": "dgpo_plugin.adapters.load",
    "read_adapter": "dgpo_plugin.adapters.load",
    "load_model": "dgpo_plugin.models",
    "UserError": "dgpo_plugin.common.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
