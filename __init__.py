"""The repository's root as a ComfyUI node pack (``git clone`` into ``custom_nodes``); nothing anywhere else."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("comfy_api") is not None:
    if importlib.util.find_spec("dgpo_plugin") is None:  # not installed by pip: it lies here
        sys.path.append(str(Path(__file__).parent))
    from .comfy_nodes import WEB_DIRECTORY, comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
