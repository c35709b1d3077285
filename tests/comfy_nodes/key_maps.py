"""Which keys of an adapter ComfyUI's loaders match, by family; run by ComfyUI's python, prints JSON.

    key_maps.py FAMILY DENOISER_WEIGHTS DENOISER_CONFIG ADAPTER...

No tiny network of ours is of a size that ComfyUI builds, and none need be: its key map looks at a model's class, its
configuration and the names of its weights.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".venv-comfy" / "ComfyUI"))
arguments, sys.argv[1:] = sys.argv[1:], ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(ROOT))


def network(family, weights, config):
    """(class, its configuration, its weights under ComfyUI's names)."""
    base = comfy.model_base
    layers = config.get("num_layers")
    if family == "sd3":
        settings = {"depth": config["num_attention_heads"], "num_blocks": layers}
        named = comfy.model_detection.convert_diffusers_mmdit(weights)
        # As comfy_nodes.shapes_model loads it: the conversion turns the layer that it takes for the last.
        for layer in {settings["depth"] - 1, layers - 1}:
            for parameter in ("weight", "bias"):
                key = f"joint_blocks.{layer}.context_block.adaLN_modulation.1.{parameter}"
                named[key] = torch.cat(named[key].chunk(2)[::-1])
        return base.SD3, settings, named
    if family == "flux":
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        settings = {"depth": layers, "depth_single_blocks": config["num_single_layers"], "hidden_size": hidden}
        return base.Flux, settings, comfy.model_detection.convert_diffusers_mmdit(weights)
    if family in ("flux2-dev", "flux2-klein"):
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        settings = {"depth": layers, "depth_single_blocks": config["num_single_layers"], "hidden_size": hidden}
        return base.Flux2, settings, flux2_native(weights, hidden)
    if family == "qwen-image":
        return base.QwenImage, {}, weights
    if family == "z-image":
        settings = {"n_layers": config["n_layers"], "dim": config["dim"]}
        settings |= {"n_refiner_layers": config["n_refiner_layers"]}
        return base.Lumina2, settings, comfy.model_detection.convert_diffusers_mmdit(weights)
    if family in ("sdxl", "sd15"):
        settings = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1]}
        settings |= {"transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 1, 1]}
        names = comfy.utils.unet_to_diffusers(settings)
        named = {names[key]: value for key, value in weights.items() if key in names}
        return (base.SDXL if family == "sdxl" else base.BaseModel), settings, named
    raise SystemExit(f"no class of ComfyUI is {family}'s")


def flux2_native(weights, hidden):
    """Black Forest Labs' names of the attention weights: q, k and v in one, the rest renamed."""
    native = {}
    for key, value in weights.items():
        place, _, rest = key.partition(".")
        number, _, rest = rest.partition(".")
        single = {"attn.to_qkv_mlp_proj.weight": "linear1.weight", "attn.to_out.weight": "linear2.weight"}
        double = {"attn.to_out.0.weight": "img_attn.proj.weight", "attn.to_add_out.weight": "txt_attn.proj.weight"}
        if place == "single_transformer_blocks" and rest in single:
            native[f"single_blocks.{number}.{single[rest]}"] = value
        elif place == "transformer_blocks" and rest in double:
            native[f"double_blocks.{number}.{double[rest]}"] = value
        elif place == "transformer_blocks" and rest in ("attn.to_q.weight", "attn.add_q_proj.weight"):
            side = "img" if "to_q" in rest else "txt"
            native[f"double_blocks.{number}.{side}_attn.qkv.weight"] = value.new_zeros(3 * hidden, hidden)
    return native


def patcher(kind, settings, named):
    """As much of ComfyUI's ModelPatcher as the strict loader asks for, with weights under ComfyUI's names."""
    state = {f"diffusion_model.{key}": value for key, value in named.items()}
    configured = type("Config", (), {"unet_config": settings})

    class Tiny(kind):
        model_config = configured

        def __init__(self):
            pass

        def state_dict(self):
            return state

    class Patcher:
        model = Tiny()

        def clone(self):
            return self

        def add_patches(self, patches, strength):
            self.patches = patches

        def get_key_patches(self, prefix):
            return {key: [(value, lambda weight, **_: weight)] for key, value in state.items()}

    for key, value in state.items():  # weights are also looked up as attributes
        place = Patcher.model
        *path, last = key.split(".")
        for part in path:
            place = place.__dict__.setdefault(part, type("Place", (), {})())
        place.__dict__[last] = value
    return Patcher()


def main(family, weights, config, *adapters):
    kind, settings, named = network(family, comfy.utils.load_torch_file(weights), json.loads(Path(config).read_text()))
    sys.stdout.write(json.dumps([matched(patcher(kind, settings, named), Path(adapter)) for adapter in adapters]))


def matched(model, adapter):
    """How many of an adapter's keys ComfyUI matches, and how many we do."""
    from comfy_nodes.base_weights import base_note
    from comfy_nodes.matching import apply_strictly
    from dgpo_plugin.adapters import AdapterFile
    from dgpo_plugin.common.errors import UserError

    state = model.model.state_dict()
    file = AdapterFile.read(adapter)
    tensors = file.tensors
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False)
    there = {name: patch for name, patch in patches.items() if (name[0] if isinstance(name, tuple) else name) in state}
    theirs = set().union(*(patch.loaded_keys for patch in patches.values()))
    try:
        ours = apply_strictly(model, file, 1.0)
    except UserError as error:
        return {"refused": str(error)}
    return {
        "total": len(tensors),
        "comfyui": len(theirs),
        "layers": len(there),
        "ours": ours.matched,
        "unmatched": sorted(set(tensors) - theirs),
        "base": base_note(model, file.header),
    }


if __name__ == "__main__":
    main(*arguments)
