"""Somebody else's pack, in the old node API, with a node that tells the tests what ComfyUI has loaded."""

import json
import logging

import comfy.model_management


class LoadedModels:
    """The classes of the networks that ComfyUI's model management holds."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "neighbour"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"asked": ("INT", {"default": 0})}}

    def tell(self, asked):
        held = [entry.model.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
        names = [type(getattr(model, "network", model)).__name__ for model in held]
        return {"ui": {"text": [json.dumps(names)]}}


NODE_CLASS_MAPPINGS = {"NeighbourLoadedModels": LoadedModels}
logging.info("neighbour: loaded")
