"""Compare adapter: the same seeds with and without it, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
import numpy as np
import torch
from comfy_api.latest import io, ui
from nodes import common_ksampler
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt

from .rewards import LoadedReward, score
from .types import CATEGORY, Prompts, Reward

LEAST_SIDE = 160
"""Pixels a picture has in the grid at least, so that captions fit; small ones are enlarged."""
GAP, LINE = 8, 18
"""Pixels: between pictures, and a line of text."""


class CompareAdapter(io.ComfyNode):
    """Does the adapter help? The same noise, with and without."""

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
                    "latent", tooltip="Empty latents: their size is the pictures', their number the pictures a prompt."
                ),
                Prompts.Input("prompts", tooltip="From Prompt list; a row of the grid each."),
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
                    "grid", display_name="grid", tooltip="A row a prompt: without on the left, with on the right."
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
        if without.model is not with_adapter.model:
            raise UserError("Compare adapter: the two models are different bases; patch the one that is 'without'")
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        sides: list[list[Tensor]] = [[], []]
        for row, prompt in enumerate(prompts):
            asked = clip.encode_from_tokens_scheduled(clip.tokenize(prompt.text))
            for side, model in zip(sides, (without, with_adapter), strict=True):
                (sampled,) = common_ksampler(
                    model, seed + row, steps, cfg, sampler, scheduler, asked, empty, dict(latent)
                )
                side.append(vae.decode(sampled["samples"]))
        number = len(sides[0][0])
        before, after = (torch.cat(side) for side in sides)
        if before.ndim == 5:  # a video VAE's frames
            before, after = before[:, 0], after[:, 0]
        scores: list[list[float]] | None = None
        report, gain = "no reward given", 0.0
        if reward is not None:
            each = [prompt for prompt in prompts for _ in range(number)]
            scores = [score(reward, [side], each, "Compare adapter").values for side in (before, after)]
            gain, report = summary(scores[0], scores[1], reward.name)
        grid = draw_grid(before, after, scores, [prompt.text for prompt in prompts], report.splitlines()[0])
        # On the node: the report and the grid; ui.PreviewImage alone has no text.
        shown = {**ui.PreviewImage(grid, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()}
        return io.NodeOutput(grid, before, after, gain, report, ui=shown)


def summary(before: Sequence[float], after: Sequence[float], name: str) -> tuple[float, str]:
    """The gain of the mean, and two lines for people; an interval by the pairs' standard error."""
    differences = torch.tensor(after) - torch.tensor(before)
    gain = float(differences.mean())
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else float("nan")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    first = f"{name}: {sum(before) / len(before):.4f} -> {sum(after) / len(after):.4f}, gain {gain:+.4f}"
    spread = f" (standard error {error:.4f})" if error == error else ""
    return gain, f"{first}{spread}\nbetter {better}, worse {worse}, equal {len(before) - better - worse}"


def draw_grid(
    before: Tensor, after: Tensor, scores: list[list[float]] | None, captions: Sequence[str], title: str
) -> Tensor:
    """A captioned sheet (1, H, W, 3) in [0, 1] of two batches (N, h, w, C): a row a caption, a half a batch."""
    number = len(before) // len(captions)
    enlarged = -(-LEAST_SIDE // before.shape[2])
    height, width = before.shape[1] * enlarged, before.shape[2] * enlarged
    half = number * (width + GAP)
    row_height = LINE + height + LINE + GAP
    sheet = Image.new("RGB", (2 * half + 2 * GAP, LINE * 2 + GAP + len(captions) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    draw.text((GAP, 2), _fitted(title, draw, font, sheet.width), fill="black", font=font)
    for index, (side, label) in enumerate(((before, "without"), (after, "with the adapter"))):
        left = GAP + index * (half + GAP)
        draw.text((left, LINE), label, fill="dimgray", font=font)
        for n, picture in enumerate(side):
            row, column = divmod(n, number)
            x, y = left + column * (width + GAP), 2 * LINE + row * row_height
            if column == 0 and index == 0:
                draw.text((x, y), _fitted(captions[row], draw, font, sheet.width), fill="black", font=font)
            pixels = (picture[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y + LINE))
            if scores is not None:
                worse = index == 1 and scores[1][n] < scores[0][n]
                better = index == 1 and scores[1][n] > scores[0][n]
                colour = "firebrick" if worse else "darkgreen" if better else "dimgray"
                draw.text((x, y + LINE + height), f"{scores[index][n]:.3f}", fill=colour, font=font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _fitted(text: str, draw: Any, font: Any, width: int) -> str:
    """The text, cut to so many pixels."""
    while len(text) > 4 and draw.textlength(text, font=font) > width - 2 * GAP:
        text = text[:-4].rstrip() + "..."
    return text
