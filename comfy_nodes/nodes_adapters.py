"""The nodes Load DGPO adapter and Adapter card."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .lora_files import adapter_names, adapter_text, loaded_adapter, time_of_change
from .types import CATEGORY


class LoadAdapter(io.ComfyNode):
    """Put an adapter on a model at a strength, or fail with what does not match."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOLoadAdapter",
            display_name="Load DGPO adapter",
            category=CATEGORY,
            description="Applies a LoRA strictly: every key must match, the scale is the one the file was trained "
            "with, and the card says what it is.",
            search_aliases=["lora", "load lora", "dgpo"],
            inputs=[
                io.Model.Input("model", tooltip="The base model; the adapter goes on its denoiser."),
                io.Combo.Input(
                    "adapter",
                    options=adapter_names(),
                    tooltip="A .safetensors file from the loras folders; what was trained here is in output/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is the adapter as it was trained, 0 the base model; below 0 turns it around.",
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="model", tooltip="The model with the adapter on it."),
                io.String.Output(
                    "card", display_name="card", tooltip="Keys matched, effective scale, base, and its card."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, **others: object) -> object:
        return time_of_change(adapter), others.get("strength")

    @classmethod
    def execute(cls, model: object, adapter: str, strength: float) -> io.NodeOutput:
        patched, card = loaded_adapter(model, adapter, strength)
        return io.NodeOutput(patched, card, ui=ui.PreviewText(card))


class ShowAdapterCard(io.ComfyNode):
    """Show what an adapter's file says of itself, without loading a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOAdapterCard",
            display_name="Adapter card (DGPO)",
            category=CATEGORY,
            description="What an adapter was trained on, with which reward, before and after, and its license.",
            search_aliases=["lora info", "lora metadata", "dgpo"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=adapter_names(),
                    tooltip="A .safetensors file from the loras folders.",
                ),
            ],
            outputs=[io.String.Output("card", display_name="card", tooltip="The card as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str) -> object:
        return time_of_change(adapter)

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        card = adapter_text(adapter)
        return io.NodeOutput(card, ui=ui.PreviewText(card))
