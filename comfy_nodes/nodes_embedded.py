"""The node Load embedded shapes model."""

from __future__ import annotations

from comfy_api.latest import io

from .shapes_model import ShapesText, ShapesVAE, load_shapes_transformer
from .types import CATEGORY


class LoadShapes(io.ComfyNode):
    """Load the model that needs no download."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOLoadShapes",
            display_name="Load embedded shapes model (DGPO)",
            category=CATEGORY,
            description="A tiny Stable Diffusion 3 (64 x 64 pixels, colored shapes) that is shipped with the library, "
            "to try the other nodes without a download or a GPU. Use cfg 1 to 4 and latents of 64 x 64 pixels.",
            search_aliases=["shapes", "demo model", "dgpo"],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="Its transformer, in ComfyUI's own code."),
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="Its text encoders; reads text as it is, no weights."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Its VAE, 8 pixels per latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_shapes_transformer(), ShapesText(), ShapesVAE())
