"""Load reward, Score images and Best of N."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import files_hash
from dgpo_plugin.config.load import reward_terms
from dgpo_plugin.rewards import REWARDS, WrappedReward, checked_rewards, load_reward

from .types import CATEGORY, Prompts, written_lines
from .types import Reward as RewardType

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
def loaded_reward(name: str, content: str, settings: str) -> LoadedReward:
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


class LoadReward(io.ComfyNode):
    """A reward, loaded once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOLoadReward",
            display_name="Load reward (DGPO)",
            category=CATEGORY,
            description="Something that scores pictures. It is loaded once and kept; a neural one is moved to the GPU "
            "and off it again by ComfyUI's own memory management.",
            search_aliases=["score", "aesthetic", "dgpo"],
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=reward_options(),
                    default="ocr",
                    tooltip="Shipped and installed ones, then your own .py files in models/dgpo_rewards. What one "
                    "measures is shown in the node.",
                ),
                io.String.Input(
                    "function",
                    default="reward",
                    tooltip="Only for your own file: the name in it of def reward(images, prompts), where images are "
                    "(N, 3, H, W) in [0, 1], or of a class without arguments whose objects are called so.",
                ),
                io.String.Input(
                    "settings",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Settings of the reward, one a line, as in dgpo score --set: batch_size=4, or "
                    "options.weights=/models/HPS_v2.1_compressed.pt",
                ),
            ],
            outputs=[RewardType.Output("loaded", display_name="reward", tooltip="For our other nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, reward: str, function: str, settings: str = "") -> object:
        return files_hash([full_name(reward, function)]), function, settings

    @classmethod
    def execute(cls, reward: str, function: str, settings: str = "") -> io.NodeOutput:
        name = full_name(reward, function)
        loaded = loaded_reward(name, files_hash([name]), settings)
        entry = REWARDS.get(name)
        own = f"{reward}, {function}"
        said = own if name != reward else f"{reward}: {entry.about}\n{'; '.join(entry.facts())}"
        return io.NodeOutput(loaded, ui=ui.PreviewText(said))


def for_each(prompts: Sequence[Prompt], pictures: int, where: str) -> list[Prompt]:
    """A prompt a picture: one serves all.

    Raises:
        UserError: neither one nor as many as there are pictures.
    """
    if len(prompts) not in (1, pictures):
        raise UserError(f"{where}: {len(prompts)} prompts for {pictures} pictures; give one, or one for each in order")
    return list(prompts) * (pictures if len(prompts) == 1 else 1)


def channels_first(images: Tensor) -> Tensor:
    """ComfyUI's pictures (N, H, W, C) as rewards take them, (N, 3, H, W) in [0, 1]."""
    return images[..., :3].movedim(-1, 1).float().clamp(0, 1).contiguous()


@dataclass(frozen=True)
class Scores:
    """One number a picture, with the prompt it was judged by."""

    values: list[float]
    prompts: list[Prompt]
    reward: str

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def report(self, order: Sequence[int] | None = None) -> str:
        """A line a picture, numbered from 0."""
        lines = [f"{self.reward}: mean {self.mean:.4f} of {len(self.values)}"]
        chosen = range(len(self.values)) if order is None else order
        return "\n".join(lines + [f"{n:4}  {self.values[n]:8.4f}  {self.prompts[n].text}" for n in chosen])


def score(reward: LoadedReward, batches: Sequence[Tensor], prompts: Sequence[Prompt], where: str) -> Scores:
    """Scores of batches of pictures (N, H, W, C), which may differ in size."""
    each = for_each(prompts, sum(len(batch) for batch in batches), where)
    values: list[float] = []
    for batch in batches:
        judged_by = each[len(values) : len(values) + len(batch)]
        values += checked_rewards(reward, channels_first(batch), judged_by, reward.name).tolist()
    return Scores(values, each, Path(reward.name).name)


class ScoreImages(io.ComfyNode):
    """A number a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOScoreImages",
            display_name="Score images (DGPO)",
            category=CATEGORY,
            description="Scores a batch, or a list of pictures, with a reward: a number each, their mean, a report.",
            search_aliases=["reward", "rate images", "dgpo"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of pictures of any sizes."),
                RewardType.Input("reward", tooltip="From Load reward."),
                Prompts.Input("prompts", tooltip="What the pictures should show: one for all, or one for each."),
            ],
            outputs=[
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One a picture."),
                io.Float.Output("mean", display_name="mean", tooltip="Of all pictures."),
                io.String.Output("report", display_name="report", tooltip="A line a picture."),
            ],
        )

    @classmethod
    def execute(cls, images: list[Tensor], reward: list[LoadedReward], prompts: list[list[Prompt]]) -> io.NodeOutput:
        joined = [prompt for given in prompts for prompt in given]
        scores = score(reward[0], images, joined, "Score images")
        return io.NodeOutput(scores.values, scores.mean, scores.report(), ui=ui.PreviewText(scores.report()))


class BestOfN(io.ComfyNode):
    """The best of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOBestOfN",
            display_name="Best of N (DGPO)",
            category=CATEGORY,
            description="Scores a batch and lets the k best through, best first, with their latents if they are given.",
            search_aliases=["pick best", "filter batch", "dgpo"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The batch to choose from."),
                RewardType.Input("reward", tooltip="From Load reward."),
                Prompts.Input("prompts", tooltip="What the pictures should show: one for all, or one for each."),
                io.Int.Input("k", default=1, min=1, max=4096, tooltip="How many to keep; at most the batch."),
                io.Latent.Input("latents", optional=True, tooltip="The batch's latents, to go on with the same ones."),
            ],
            outputs=[
                io.Image.Output("best", display_name="images", tooltip="The k best pictures, best first."),
                io.Latent.Output("kept", display_name="latents", tooltip="Their latents; empty if none were given."),
                io.Int.Output("indices", display_name="indices", is_output_list=True, tooltip="Their places, from 0."),
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="Their scores."),
                io.String.Output("report", display_name="report", tooltip="A line for each that is kept."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        reward: LoadedReward,
        prompts: list[Prompt],
        k: int,
        latents: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        if k > len(images):
            raise UserError(f"Best of N: k is {k}, but the batch has {len(images)} pictures; lower k")
        if latents is not None and len(latents["samples"]) != len(images):
            raise UserError(
                f"Best of N: {len(latents['samples'])} latents for {len(images)} pictures; give the batch's"
            )
        scores = score(reward, [images], prompts, "Best of N")
        order = sorted(range(len(images)), key=lambda n: -scores.values[n])[:k]
        kept = None if latents is None else _chosen(latents, order, len(images))
        report = scores.report(order)
        best = [scores.values[n] for n in order]
        return io.NodeOutput(images[order], kept, order, best, report, ui=ui.PreviewText(report))


def _chosen(latents: dict[str, Any], order: list[int], count: int) -> dict[str, Any]:
    """The chosen ones of a latent batch, with what else is told of each (its mask, its seed's number)."""
    chosen = {**latents, "samples": latents["samples"][order]}
    mask = latents.get("noise_mask")
    if mask is not None and len(mask) == count:
        chosen["noise_mask"] = mask[order]
    chosen["batch_index"] = [latents.get("batch_index", list(range(count)))[n] for n in order]
    return chosen
