"""Every kind of update that ComfyUI knows, on the embedded model, by us and by ComfyUI; run by its python, prints JSON.

kinds_of_update.py FOLDER
"""

import json
import logging
import sys
from pathlib import Path

import key_maps  # it lies beside this file
import torch
from safetensors.torch import save_file

from comfy_nodes.matching import apply_strictly
from dgpo_plugin.adapters import AdapterFile
from dgpo_plugin.common.errors import UserError

comfy = key_maps.comfy
PIPELINE = key_maps.ROOT / "dgpo_plugin/worlds/shapes/pipeline/transformer"
OUT, FF, LAST, INNER = (
    "transformer.transformer_blocks.0.attn.to_out.0",
    "transformer.transformer_blocks.0.ff.net.0.proj",
    "transformer.transformer_blocks.3.norm1_context.linear",
    "transformer.transformer_blocks.1.norm1_context.linear",
)
NATIVE = "diffusion_model.joint_blocks.0.x_block.attn.proj"
Q, NORM = "transformer.transformer_blocks.0.attn.to_q", "transformer.norm_out.linear"
BIASED = "transformer.proj_out"
draws = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=draws) / 10


def lora(name, outputs, inputs, down=".lora_A.weight", up=".lora_B.weight", rank=4):
    return {name + down: random(rank, inputs), name + up: random(outputs, rank)}


def parts(name, **shapes):
    return {f"{name}.{part.replace('__', '.')}": random(*shape) for part, shape in shapes.items()}


def loha(name, outputs, inputs):
    halves = {"hada_w1_a": (outputs, 2), "hada_w1_b": (2, inputs), "hada_w2_a": (outputs, 2), "hada_w2_b": (2, inputs)}
    return parts(name, **halves)


GLORA = {"a1__weight": (4, 128), "a2__weight": (128, 4), "b1__weight": (4, 128), "b2__weight": (128, 4)}
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
APPLIED = {
    "lora": lora(OUT, 128, 128),
    "lora_old_names": lora(OUT, 128, 128, ".lora.down.weight", ".lora.up.weight"),
    "lora_older_names": lora(OUT, 128, 128, "_lora.down.weight", "_lora.up.weight"),
    "lora_default": lora(OUT, 128, 128, ".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_native": lora(NATIVE, 128, 128, ".lora_down.weight", ".lora_up.weight"),
    "lora_alpha": {**lora(OUT, 128, 128), f"{OUT}.alpha": torch.tensor(2.0)},
    "lora_of_a_section": lora(Q, 128, 128),
    "three_parts": lora(NORM, 256, 128),
    "three_parts_last": lora(LAST, 256, 128),
    "inner_context": lora(INNER, 768, 128),
    "dora": {**lora(OUT, 128, 128), **parts(OUT, dora_scale=(128, 1))},
    "dora_of_columns": {**lora(OUT, 128, 128), **parts(OUT, dora_scale=(1, 128))},
    "dora_of_a_section": {**lora(Q, 128, 128), **parts(Q, dora_scale=(128, 1))},
    "dora_of_lokr": parts(OUT, lokr_w1=(8, 8), lokr_w2=(16, 16), dora_scale=(128, 1)),
    "diff": parts(NATIVE, diff=(128, 128)),
    "diff_b": parts(NATIVE, diff_b=(128,)),
    "lora_and_diff_b": {**lora(OUT, 128, 128), **parts(OUT, diff_b=(128,))},
    "lora_and_diff_b_elsewhere": {**lora(Q, 128, 128), **parts(OUT, diff_b=(128,))},
    "bias_by_its_own_name": parts("diffusion_model.joint_blocks.0.x_block.attn.proj.bias", diff=(128,)),
    "set_weight": parts(NATIVE, set_weight=(128, 128)),
    "loha": loha(OUT, 128, 128),
    "loha_alpha": {**loha(OUT, 128, 128), f"{OUT}.alpha": torch.tensor(1.0)},
    "lokr": parts(OUT, lokr_w1=(8, 8), lokr_w2=(16, 16)),
    "lokr_low_rank": parts(OUT, lokr_w1=(8, 8), lokr_w2_a=(16, 2), lokr_w2_b=(2, 16)),
    "lokr_low_rank_both": parts(OUT, lokr_w1_a=(8, 2), lokr_w1_b=(2, 8), lokr_w2_a=(16, 2), lokr_w2_b=(2, 16)),
    "oft": parts(OUT, oft_blocks=(8, 16, 16)),
    "boft": {**parts(OUT, oft_blocks=(3, 8, 16, 16)), f"{OUT}.alpha": torch.tensor(0.0)},
    "glora": parts(OUT, **GLORA),
    "lora_and_loha": {**lora(Q, 128, 128), **loha(OUT, 128, 128)},
    "lora_and_lokr": {**lora(Q, 128, 128), **parts(OUT, lokr_w1=(8, 8), lokr_w2=(16, 16))},
    "lora_and_text": {**lora(Q, 128, 128), **lora(TEXT, 64, 64, ".lora_down.weight", ".lora_up.weight")},
}
REFUSED = {
    "lora_and_diff_on_one": {**lora(NATIVE, 128, 128), **parts(NATIVE, diff=(128, 128))},
    "lora_and_lokr_on_one": {**lora(OUT, 128, 128), **parts(OUT, lokr_w1=(8, 8), lokr_w2=(16, 16))},
    "two_names_for_one": {**lora(OUT, 128, 128), **lora(NATIVE, 128, 128)},
    "bias_of_a_section": parts(Q, diff_b=(128,)),
    "bias_of_three_parts": {**lora(NORM, 256, 128), **parts(NORM, diff_b=(256,))},
    "bias_of_peft": {**lora(OUT, 128, 128), f"{OUT}.lora_B.bias": random(128)},
    "boft_without_alpha": parts(OUT, oft_blocks=(3, 8, 16, 16)),
    "vera": {**lora(Q, 128, 128), **parts(OUT, vera_lambda_b=(128,))},
    "ia3": {**lora(Q, 128, 128), **parts(OUT, ia3_l=(128, 1))},
    "oft_of_peft": {**lora(Q, 128, 128), **parts(OUT, oft_R__weight=(8, 120))},
    "dora_of_peft": {**lora(OUT, 128, 128), **parts(OUT, lora_magnitude_vector=(128,))},
    "dora_in_a_list": {**lora(OUT, 128, 128), **parts(OUT, dora_scale=(128,))},
    "dora_of_another_size": {**lora(OUT, 128, 128), **parts(OUT, dora_scale=(64, 1))},
    "half": {f"{OUT}.lora_B.weight": random(128, 4)} | lora(Q, 128, 128),
    "other_half": {f"{OUT}.lora_A.weight": random(4, 128)} | lora(Q, 128, 128),
    "half_a_loha": {f"{OUT}.hada_w1_a": random(128, 2)},
    "half_a_lokr": parts(OUT, lokr_w1=(8, 8), lokr_w2_a=(16, 2)),
    "lora_of_another_size": lora(OUT, 128, 64),
    "loha_of_another_size": loha(OUT, 128, 64),
    "lokr_of_another_size": parts(OUT, lokr_w1=(8, 8), lokr_w2=(16, 8)),
    "oft_of_another_size": parts(OUT, oft_blocks=(4, 16, 16)),
    "diff_of_another_size": parts(NATIVE, diff=(128, 64)),
    "text_alone": lora(TEXT, 64, 64, ".lora_down.weight", ".lora_up.weight"),
    "no_known_kind": {**lora(OUT, 128, 128), f"{Q}.strange_thing": random(4)},
}


FLUX = {
    "img_in.weight": (64, 16),
    "img_in.bias": (64,),
    "double_blocks.0.img_attn.qkv.weight": (192, 64),
    "double_blocks.0.img_attn.qkv.bias": (192,),
    "double_blocks.0.img_attn.norm.key_norm.weight": (32,),
    "single_blocks.0.linear1.weight": (448, 64),
    "single_blocks.0.norm.key_norm.weight": (32,),
}
"""As much of a FLUX.1 as its control LoRA's (Canny, Depth) are for: twice as many inputs, biases, norms set anew."""
CONTROL = {
    **lora("img_in", 64, 32),
    **parts("img_in", lora_B__bias=(64,)),
    **lora("double_blocks.0.img_attn.qkv", 192, 64),
    **parts("double_blocks.0.img_attn.qkv", lora_B__bias=(192,)),
    "double_blocks.0.img_attn.norm.key_norm.scale": random(32),
    "single_blocks.0.norm.key_norm.scale": random(32),
}


def weights_after(state, patches):
    """The weights that patches change, as ComfyUI computes them: the keys of a section are of one weight."""
    after = {}
    for key, patch in patches.items():
        name, section, function = (*key, None, None)[:3] if isinstance(key, tuple) else (key, None, None)
        weight = after.setdefault(name, state[name].clone())
        after[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, section, function)], weight, name)
    return after


def applied(model, file, tensors):
    """How ours and ComfyUI's own loader agree, and whether anything changed."""
    state = model.model.state_dict()
    put = apply_strictly(model, file, 1.0)
    ours = weights_after(state, model.patches)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    theirs = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False)
    expected = weights_after(state, theirs)
    return {
        "matched": put.matched,
        "total": put.total,
        "kinds": put.kinds,
        "for_text": len(put.for_text),
        "changed": sorted(name for name in ours if not torch.equal(ours[name], state[name])),
        "same": sorted(ours) == sorted(expected) and all(torch.equal(ours[name], expected[name]) for name in ours),
        "update": {
            name: (weight - state[name]).double().sum(1).tolist()
            for name, weight in ours.items()
            if weight.ndim > 1 and weight.shape == state[name].shape
        },
    }


def main(folder):
    weights = comfy.utils.load_torch_file(str(PIPELINE / "diffusion_pytorch_model.safetensors"))
    config = json.loads((PIPELINE / "config.json").read_text())
    weights = {key: value.float() for key, value in weights.items()}
    kind, settings, named = key_maps.network("sd3", weights, config)
    said, results = [], {}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    for name, tensors in {**APPLIED, **REFUSED, "control": CONTROL}.items():
        path = Path(folder) / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        said.clear()
        try:
            model = key_maps.patcher(kind, settings, named)
            if name == "control":
                sizes = {"depth": 1, "depth_single_blocks": 1, "hidden_size": 64}
                flux = {key: random(*shape) for key, shape in FLUX.items()}
                model = key_maps.patcher(comfy.model_base.Flux, sizes, flux)
            results[name] = applied(model, AdapterFile.read(path), tensors)
        except UserError as error:
            results[name] = {"error": str(error)}
        results[name]["logged"] = [line for line in said if "ERROR" in line or "MISMATCH" in line]
    results["expected"] = {
        name: (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).double().sum(1).tolist()
        for name, module in (("three_parts", NORM), ("three_parts_last", LAST), ("inner_context", INNER))
        for tensors in (APPLIED[name],)
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(*key_maps.arguments)
