"""The node Prompt list."""

from __future__ import annotations

from comfy_api.latest import io, ui

from dgpo_plugin.prompts.registry import prompt_set_names

from .prompt_lists import OWN_TEXT, chosen_prompts
from .types import CATEGORY, Prompts


class PromptList(io.ComfyNode):
    """Give prompts for scoring, comparing and training, with what rewards need to know about each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOPromptList",
            display_name="Prompt list (DGPO)",
            category=CATEGORY,
            description="Prompts for scoring, comparing and training: your own, or a shipped set whose prompts carry "
            "what its reward needs to know.",
            search_aliases=["prompts", "dgpo"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[OWN_TEXT, *prompt_set_names()],
                    default=OWN_TEXT,
                    tooltip="Your own text, or a shipped set. The reward 'shapes' needs one that starts with shapes/.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default='A sign that reads "Open"',
                    tooltip="With 'the text below': one prompt per line, or one line with a file (.txt, .jsonl) or a "
                    "dataset (hf:owner/name).",
                ),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="How many prompts to leave out first."),
                io.Int.Input(
                    "count", default=0, min=0, max=1_000_000, tooltip="How many prompts to take; 0 takes all there are."
                ),
            ],
            outputs=[
                Prompts.Output("prompts", display_name="prompts", tooltip="For our other nodes."),
                io.String.Output(
                    "texts",
                    display_name="texts",
                    is_output_list=True,
                    tooltip="The prompts one by one: what comes after runs once for each.",
                ),
                io.Int.Output("number", display_name="number", tooltip="How many prompts there are."),
            ],
        )

    @classmethod
    def execute(cls, source: str, text: str, start: int, count: int) -> io.NodeOutput:
        chosen = chosen_prompts(source, text, start, count)
        texts = [prompt.text for prompt in chosen]
        return io.NodeOutput(chosen, texts, len(chosen), ui=ui.PreviewText("\n".join(texts)))
