"""Rewards in the memory of a ComfyUI: which there are, loaded once, moved by its own model management."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.load import reward_terms
from dgpo_plugin.rewards import REWARDS, WrappedReward, load_reward

from .types import written_lines

FOLDER = "dgpo_rewards"
"""Users' own rewards are Python files in ``models/dgpo_rewards``: nothing that a browser can upload to."""
# Without the extension ComfyUI would list nothing there.
folder_paths.folder_names_and_paths.setdefault(FOLDER, ([str(Path(folder_paths.models_dir) / FOLDER)], {".py"}))


class LoadedReward(WrappedReward):
    """A reward in memory, its network (if it has one) in the hands of ComfyUI's model management.

    Attributes:
        name: as ``dgpo_plugin`` knows it; a path and a function for a user's own.
    """

    def __init__(self, name: str, settings: Sequence[str]) -> None:
        self.name = name
        terms, scoring = reward_terms([name], settings)
        # Nodes run in inference mode; weights made in it could not be used by a training that runs outside.
        with torch.inference_mode(False):
            super().__init__(load_reward(name, terms[name], scoring))
        self._patcher = None if self.network is None else _patcher(self.network)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (N,) of pictures (N, 3, H, W) in [0, 1]."""
        if self._patcher is not None:
            # Made room for by what else is loaded, and to be unloaded again when others need the room.
            comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
            self.device = self._patcher.load_device
        return self.inner(images, prompts)


class _Held(nn.Module):
    """A network for ModelPatcher, which sets attributes on it that transformers' models do not let be set."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def _patcher(network: nn.Module) -> Any:
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        _Held(network), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


@functools.lru_cache(maxsize=4)
def loaded_reward(name: str, content: str, settings: str) -> LoadedReward:  # noqa: ARG001  # a key of the cache
    """Loaded once and kept; ``content`` is the hash of a user's own file, so that a changed one is loaded again."""
    return LoadedReward(name, written_lines(settings))


def reward_options() -> list[str]:
    """Shipped and installed rewards, then users' own files."""
    return [*REWARDS, *folder_paths.get_filename_list(FOLDER)]


def full_name(reward: str, function: str) -> str:
    """A reward's name in the library."""
    if not reward.endswith(".py"):
        return reward
    path = folder_paths.get_full_path(FOLDER, reward)
    if path is None:
        raise UserError(f"reward {reward}: not in models/{FOLDER} any more; press R to read the folder again")
    return f"{path}:{function}"
