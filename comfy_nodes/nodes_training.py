"""The node Train DGPO adapter."""

from __future__ import annotations

from comfy_api.latest import io, ui

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.load import preset_names

from .loaded_reward import LoadedReward
from .run_files import publish, read_result, run_folder, write_prompts
from .run_settings import node_config
from .types import CATEGORY, Prompts, Reward
from .watched_run import run_watched


class TrainAdapter(io.ComfyNode):
    """Train an adapter: a run of ``dgpo train``, watched and stopped from here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOTrainAdapter",
            display_name="Train DGPO adapter",
            category=CATEGORY,
            description="Trains a LoRA on a diffusers model so that its pictures score better on a reward. The adapter "
            "goes to output/loras, the run to output/dgpo; stopping it saves both, and 'resume' goes on.",
            search_aliases=["train lora", "reinforcement learning", "rl", "dgpo"],
            is_output_node=True,
            inputs=[
                Prompts.Input("prompts", tooltip="What to train on, from Prompt list; tens at least, better hundreds."),
                Reward.Input("reward", tooltip="What is to be raised, from Load reward."),
                io.String.Input(
                    "model",
                    default="shapes",
                    tooltip="A diffusers model folder or a hub id, not a checkpoint file; 'shapes' is the shipped one.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(preset_names()),
                    default="shapes",
                    tooltip="Where all other settings come from: shapes for the shipped model, sd35-... for large.",
                ),
                io.String.Input(
                    "name",
                    default="dgpo-adapter",
                    tooltip="Of the file in output/loras (letters, digits, - _ .); a taken one gets a number.",
                ),
                io.Int.Input(
                    "iterations", default=50, min=1, max=100_000, tooltip="Rounds of sampling, scoring and learning."
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Of the adapter: its size and capacity."),
                io.Int.Input(
                    "prompts_per_iteration", default=4, min=1, max=1024, tooltip="Prompts drawn in an iteration."
                ),
                io.Int.Input(
                    "group_size", default=16, min=2, max=1024, tooltip="Pictures per prompt, compared with each other."
                ),
                io.Int.Input(
                    "micro_batch_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Pictures in memory at once, 0 for all. Lower it if memory runs out: same result.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    tooltip="Of everything that is drawn.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    tooltip="Go on with the run of this name from where it was stopped. Off starts a new one.",
                ),
                Prompts.Input(
                    "held_out",
                    optional=True,
                    tooltip="What before and after are measured on; the training prompts if it is left out.",
                ),
                io.String.Input(
                    "settings",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Any other setting, one per line, as in dgpo train --set: training.learning_rate=1e-3",
                ),
                io.Int.Input(
                    "width",
                    optional=True,
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Of the pictures, in pixels; 0, with height 0 too, for the preset's or the model's own.",
                ),
                io.Int.Input(
                    "height", optional=True, default=0, min=0, max=16384, tooltip="Likewise; give both or neither."
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora", display_name="lora", tooltip="For ComfyUI's Load LoRA Model and Save LoRA."
                ),
                io.LossMap.Output("loss_map", display_name="loss_map", tooltip="For ComfyUI's Plot Loss Graph."),
                io.String.Output("file", display_name="file", tooltip="The adapter's name in the loras folders."),
                io.String.Output("report", display_name="report", tooltip="The adapter's card."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        prompts: list[Prompt],
        reward: LoadedReward,
        model: str,
        preset: str,
        name: str,
        iterations: int,
        rank: int,
        prompts_per_iteration: int,
        group_size: int,
        micro_batch_size: int,
        seed: int,
        resume: bool,
        held_out: list[Prompt] | None = None,
        settings: str = "",
        width: int = 0,
        height: int = 0,
    ) -> io.NodeOutput:
        folder = run_folder(name, resume)
        values = {
            "model.path": model,
            "rewards": {reward.name: {"weight": 1}},
            "prompts.train": str(folder / "prompts.jsonl"),
            "prompts.held_out": None if held_out is None else str(folder / "held-out.jsonl"),
            "training.iterations": iterations,
            "training.prompts_per_iteration": prompts_per_iteration,
            "training.group_size": group_size,
            "training.micro_batch_size": micro_batch_size or None,
            "training.seed": seed,
            "lora.rank": rank,
        }
        if width or height:
            values |= {"model.width": width or None, "model.height": height or None}
        config = node_config(preset, values, settings)
        write_prompts(folder / "prompts.jsonl", prompts)
        if held_out is not None:
            write_prompts(folder / "held-out.jsonl", held_out)
        adapter = run_watched(config, folder, reward, str(cls.hidden.unique_id))
        result = read_result(folder, adapter)
        shown = ui.PreviewText(result.card)
        return io.NodeOutput(result.tensors, {"loss": result.losses}, publish(folder), result.card, ui=shown)
