"""The nodes Load reward, Score images and Best of N."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import files_hash
from dgpo_plugin.rewards import REWARDS

from .loaded_reward import LoadedReward, full_name, loaded_reward, reward_options
from .scores import chosen_latents, score
from .types import CATEGORY, Prompts
from .types import Reward as RewardType


class LoadReward(io.ComfyNode):
    """Loads a reward, once."""

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


class ScoreImages(io.ComfyNode):
    """Gives each picture a number."""

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
    """Lets the best of a batch through."""

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
        kept = None if latents is None else chosen_latents(latents, order, len(images))
        report = scores.report(order)
        best = [scores.values[n] for n in order]
        return io.NodeOutput(images[order], kept, order, best, report, ui=ui.PreviewText(report))
