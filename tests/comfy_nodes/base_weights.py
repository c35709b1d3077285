"""What the pack says of models' weights, loaded by ComfyUI itself; run by ComfyUI's python, prints JSON.

    base_weights.py ADAPTER MODEL...

A model is a file; behind its path ``:single`` makes it a single-file checkpoint first, ``:fp8`` has the loader cast it,
and ``:patched`` puts the adapter in its weights. In a model's place may stand the header of another adapter, as JSON.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".venv-comfy" / "ComfyUI"))
arguments, sys.argv[1:] = sys.argv[1:], ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(ROOT))


def note(adapter: str, place: str) -> str:
    from comfy_nodes.base_weights import base_note
    from comfy_nodes.matching import apply_strictly
    from dgpo_plugin.adapters import AdapterFile

    if place.startswith("{"):
        return base_note(None, json.loads(place))
    path, _, how = place.partition(":")
    if how == "single":
        weights = comfy.model_detection.convert_diffusers_mmdit(comfy.utils.load_torch_file(path))
        path += ".single.safetensors"
        contiguous = {f"model.diffusion_model.{name}": t.contiguous() for name, t in weights.items()}
        comfy.utils.save_torch_file(contiguous, path)
    file = AdapterFile.read(Path(adapter))
    model = comfy.sd.load_diffusion_model(path, {"dtype": torch.float8_e4m3fn} if how == "fp8" else {})
    if how == "patched":
        model = apply_strictly(model, file, 1.0).model
        before = model.model_state_dict()["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].clone()
        comfy.model_management.load_models_gpu([model], force_patch_weights=True)
        after = model.model_state_dict()["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]
        assert not torch.equal(before, after)
    return base_note(model, file.header)


if __name__ == "__main__":
    adapter, *places = arguments
    sys.stdout.write(json.dumps([note(adapter, place) for place in places]))
