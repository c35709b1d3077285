"""Fine-tune text-to-image models with a reward.

The public names are imported on first use, so that ``import dgpo_plugin`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "dgpo_plugin.config",
    "load_config": "dgpo_plugin.config_files",
    "Prompt": "dgpo_plugin.prompts",
    "read_prompts": "dgpo_plugin.prompts",
    "Trainer": "dgpo_plugin.trainer",
    "apply_adapter": "dgpo_plugin.export",
    "read_adapter": "dgpo_plugin.export",
    "load_model": "dgpo_plugin.models",
    "UserError": "dgpo_plugin.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
