"""Load DGPO adapter and Adapter card."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from dgpo_plugin.adapters.card import describe_adapter
from dgpo_plugin.adapters.load import usable_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.tables import as_table

from .matching import apply_strictly, base_note
from .types import CATEGORY

# With an adapter for the embedded model, so that the example workflows run as they are.
folder_paths.add_model_folder_path("loras", str(Path(__file__).parent / "loras"))


class LoadAdapter(io.ComfyNode):
    """An adapter on a model, at the strength that was asked for, or an error."""

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
                    options=folder_paths.get_filename_list("loras"),
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
        return _changed(adapter), others.get("strength")

    @classmethod
    def execute(cls, model: object, adapter: str, strength: float) -> io.NodeOutput:
        path = adapter_path(adapter)
        scaled, header, scale = usable_adapter(path, f"adapter {adapter}")
        matched = apply_strictly(model, scaled, strength, header, f"adapter {adapter}")
        rows = [
            ("keys", f"{matched.matched} of {matched.total} matched"),
            ("scale", scale),
            ("strength", f"{strength:g}"),
            ("base", base_note(model, header)),
        ]
        card = as_table(rows + [row for row in own_rows(adapter) if row[0] != "scale"])
        return io.NodeOutput(matched.model, card, ui=ui.PreviewText(card))


class AdapterCard(io.ComfyNode):
    """What an adapter's header says, without loading a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOAdapterCard",
            display_name="Adapter card (DGPO)",
            category=CATEGORY,
            description="What an adapter was trained on, with which reward, before and after, and its licence.",
            search_aliases=["lora info", "lora metadata", "dgpo"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file from the loras folders.",
                ),
            ],
            outputs=[io.String.Output("card", display_name="card", tooltip="The card as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str) -> object:
        return _changed(adapter)

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        card = as_table(own_rows(adapter))
        return io.NodeOutput(card, ui=ui.PreviewText(card))


def adapter_path(name: str) -> Path:
    """Of a file that the loras folders list.

    Raises:
        UserError: it is gone.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise UserError(f"adapter {name}: not in the loras folders any more; press R to read them again")
    return Path(path)


def own_rows(name: str) -> list[tuple[str, str]]:
    """What a file says about itself, under the name that ComfyUI lists it by."""
    return [("file", name), *describe_adapter(adapter_path(name))[1:]]


def _changed(name: str) -> object:
    """So that a file that was written again is loaded again."""
    path = folder_paths.get_full_path("loras", name)
    return None if path is None else Path(path).stat().st_mtime_ns
