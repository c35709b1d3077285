"""The node Compare adapter."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from dgpo_plugin.common.prompt import Prompt

from .comparison import SamplerSettings, sample_both, score_both
from .comparison_grid import draw_grid
from .loaded_reward import LoadedReward
from .types import CATEGORY, Prompts, Reward


class CompareAdapter(io.ComfyNode):
    """Sample the same noise with and without an adapter, and say which is better."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOCompareAdapter",
            display_name="Compare adapter (DGPO)",
            category=CATEGORY,
            description="Samples every prompt from the same seeds with two models (the base and the one with the "
            "adapter), scores both, and shows them side by side.",
            search_aliases=["compare lora", "before after", "xy plot", "dgpo"],
            is_output_node=True,
            inputs=[
                io.Model.Input("without", tooltip="The base model."),
                io.Model.Input("with_adapter", tooltip="The same model from Load DGPO adapter."),
                io.Clip.Input("clip", tooltip="Encodes the prompts; the empty text is the negative prompt."),
                io.Vae.Input("vae", tooltip="Decodes the latents."),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty latents: their size is the pictures', their number the pictures per prompt.",
                ),
                Prompts.Input("prompts", tooltip="From Prompt list; each a row of the grid."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    tooltip="Of the first prompt; the next has one more.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Of the sampler."),
                io.Float.Input(
                    "cfg", default=4.5, min=1.0, max=30.0, step=0.1, tooltip="Guidance; 1 is none and twice as fast."
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    default="euler",
                    tooltip="As in KSampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    default="simple",
                    tooltip="As in KSampler.",
                ),
                Reward.Input("reward", optional=True, tooltip="Scores the pictures; without one there are no scores."),
            ],
            outputs=[
                io.Image.Output(
                    "grid", display_name="grid", tooltip="One row per prompt: without on the left, with on the right."
                ),
                io.Image.Output("images_without", display_name="without", tooltip="The base's pictures."),
                io.Image.Output("images_with", display_name="with", tooltip="The adapter's pictures."),
                io.Float.Output(
                    "gain", display_name="gain", tooltip="Mean score with, minus without; 0 with no reward."
                ),
                io.String.Output("report", display_name="report", tooltip="Means and how often which was better."),
            ],
        )

    @classmethod
    def execute(
        cls,
        without: Any,
        with_adapter: Any,
        clip: Any,
        vae: Any,
        latent: dict[str, Any],
        prompts: list[Prompt],
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        scheduler: str,
        reward: LoadedReward | None = None,
    ) -> io.NodeOutput:
        settings = SamplerSettings(seed, steps, cfg, sampler, scheduler)
        before, after = sample_both(without, with_adapter, clip, vae, latent, prompts, settings)
        result = score_both(reward, before, after, prompts)
        captions = [prompt.text for prompt in prompts]
        grid = draw_grid(before, after, result.scores, captions, result.report.splitlines()[0])
        # On the node: the report and the grid; ui.PreviewImage alone has no text.
        shown = {**ui.PreviewImage(grid, cls=cls).as_dict(), **ui.PreviewText(result.report).as_dict()}
        return io.NodeOutput(grid, before, after, result.gain, result.report, ui=shown)
