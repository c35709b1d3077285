"""Run in the original packages' environment: their own ``score`` on a folder's pictures, prompts and weights.

    python originals.py FOLDER scores      writes scores.json: theirs, and ours with ``backend: package``
    python originals.py FOLDER seconds     writes seconds.json: what theirs and ours take for the same pictures

FOLDER holds cases.json, a list of {"file": ..., "prompt": ...}, and settings.json with the checkpoints' sizes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import shims  # noqa: F401  (first)
import torch
from PIL import Image

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import Reward, load_reward
from dgpo_plugin.rewards.networks.hpsv2 import FILES
from dgpo_plugin.rewards.picture_files import read_picture


def prepare_hpsv2(size: dict[str, int], weights: Path) -> Any:
    """Its network in our size, and the local checkpoint for whatever it would download."""
    import hpsv2
    import huggingface_hub
    from hpsv2.src.open_clip import factory
    from hpsv2.utils import hps_version_map

    assert hps_version_map == FILES
    factory._MODEL_CONFIGS["ViT-H-14"] = {  # noqa: SLF001  # open_clip has no public way
        "embed_dim": size["embedding"],
        "vision_cfg": {
            "image_size": size["side"],
            "layers": size["vision_layers"],
            "width": size["vision_width"],
            "head_width": 80,
            "patch_size": size["patch"],
        },
        "text_cfg": {
            "context_length": size["tokens"],
            "vocab_size": size["vocabulary"],
            "width": size["text_width"],
            "heads": size["text_width"] // 64,
            "layers": size["text_layers"],
        },
    }
    factory.download_pretrained = lambda *_, **__: str(weights)
    huggingface_hub.hf_hub_download = lambda *_, **__: str(weights)
    return hpsv2


def prepare_imagereward(size: dict[str, int], weights: Path) -> Any:
    """Its image encoder in our size; the rest is in med_config.json, and the tokenizer in this folder."""
    import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    def create_vit(kind: str, side: int, *_: object) -> tuple[Any, int]:
        width = size["vision_width"]
        heads = width // 64
        made = VisionTransformer(
            img_size=side, patch_size=16, embed_dim=width, depth=size["vision_layers"], num_heads=heads
        )
        return made, width

    blip_pretrain.create_vit = create_vit
    model = ImageReward.load(str(weights), device="cpu", med_config=str(weights.with_name("med_config.json")))
    places, saved = set(model.state_dict()), set(torch.load(weights))
    assert places == saved, f"the format differs: {sorted(places ^ saved)}"  # its own loading would not say so
    return model


def ours(name: str, precision: Literal["fp32", "bf16"] = "fp32", **options: str) -> Reward:
    return load_reward(name, RewardTerm(options=options, device="cpu", precision=precision))


def main(folder: Path, what: str) -> None:
    os.chdir(folder)  # "bert-base-uncased" is then the folder of that name
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = json.loads(Path("settings.json").read_text())
    cases = json.loads(Path("cases.json").read_text())
    files, texts = [case["file"] for case in cases], [case["prompt"] for case in cases]
    prompts = [Prompt(text) for text in texts]
    result: dict[str, Any] = {}
    for name in settings["rewards"]:
        weights = folder / settings["weights"][name]
        tokenizer = str(folder / settings["tokenizers"][name])
        if name == "imagereward":
            model = prepare_imagereward(settings["blip"], weights)
            score = model.score
        else:
            hpsv2 = prepare_hpsv2(settings["clip"], weights)
            version = {"hpsv2": "v2.0", "hpsv2.1": "v2.1"}[name]
            score = lambda text, file, v=version, package=hpsv2: package.score(file, text, hps_version=v)  # noqa: E731
        if what == "scores":
            pictures = [read_picture(Path(file)) for file in files]
            package = ours(name, backend="package", weights=str(weights))
            result[name] = {
                "original": _theirs(score, files, texts),
                "package": [package(p[None], [t]).item() for p, t in zip(pictures, prompts, strict=True)],
            }
        else:
            count = settings["pictures"][name]
            native = partial(ours, name, weights=str(weights), tokenizer=tokenizer)
            result[name] = seconds(score, native, files[:count], prompts[:count])
        del score
        sys.modules["hpsv2.img_score"].model_dict.clear()  # its network, which it keeps
    Path(f"{what}.json").write_text(json.dumps(result, indent=1))


def _theirs(score: Callable[..., Any], files: list[str], texts: list[str]) -> list[float]:
    return [_number(score(text, file)) for file, text in zip(files, texts, strict=True)]


def _number(score: Any) -> float:
    return float(score[0] if isinstance(score, list) else score)


def seconds(
    score: Callable[..., Any],
    native: Callable[..., Reward],
    files: list[str],
    prompts: list[Prompt],
) -> dict[str, float]:
    """CPU seconds for all pictures, each with its prompt; theirs also for all in one call, as if of one prompt.

    And ``bf16_off``, the largest difference between our two precisions.
    """
    texts = [prompt.text for prompt in prompts]

    def timed(run: Callable[[], Any]) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    values: dict[str, torch.Tensor] = {}

    def all_ours(reward: Reward, precision: str) -> None:
        values[precision] = reward(torch.stack([read_picture(Path(file)) for file in files]), prompts)

    score(prompts[0].text, files[0])  # what happens only once is no one's time
    found = {
        "pictures": len(files),
        "original": timed(lambda: _theirs(score, files, texts)),
        "original_one_prompt": timed(lambda: score(prompts[0].text, files)),
    }
    for precision in ("fp32", "bf16"):
        reward = native(precision)
        reward(read_picture(Path(files[0]))[None], prompts[:1])
        found[precision] = timed(partial(all_ours, reward, precision))
        del reward
    found["bf16_off"] = (values["bf16"] - values["fp32"]).abs().max().item()
    return found


if __name__ == "__main__":
    with Image.new("RGB", (1, 1)):  # Pillow's plugins are loaded on first use
        main(Path(sys.argv[1]).resolve(), sys.argv[2])
