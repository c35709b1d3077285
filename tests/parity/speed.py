"""The CPU time of 64 pictures, ours and the original packages', on the same random weights.

`python -m tests.parity.speed` from the repository's root, in the environment of `make test`.

Sizes: tiny, where everything but the arithmetic shows, and with `--full` that of the published networks, with fewer
pictures. Pictures are 512 x 512 PNG files, each with a prompt of its own, as in training; `one prompt` is the
packages' faster way, all pictures in one call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.parity import environment
from tests.parity.checkpoints import (
    BLIP_L,
    VIT_H,
    BlipSize,
    ClipSize,
    bert_tokenizer,
    clip_tokenizer,
    hpsv2_checkpoint,
    imagereward_checkpoint,
    published_words,
)

PICTURES = 64
PICTURES_FULL = {"hpsv2.1": 8, "imagereward": 16}


def measure(folder: Path, full: bool, threads: int) -> dict[str, dict[str, float]]:
    """Seconds by reward."""
    random = np.random.default_rng(0)
    cases = []
    for place in range(PICTURES):
        picture = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((512, 512))
        picture.save(folder / f"{place}.png")
        cases.append({"file": f"{place}.png", "prompt": f"a photo of {place} dogs in front of a house, at dusk"})
    (folder / "cases.json").write_text(json.dumps(cases))
    clip, blip = (VIT_H, BLIP_L) if full else (ClipSize(), BlipSize())
    # The published checkpoints of HPSv2 are half precision.
    hpsv2_checkpoint(folder / "hpsv2.pt", clip, dtype=torch.float16)
    imagereward_checkpoint(folder / "imagereward.pt", blip)
    clip_tokenizer(folder / "clip", published_words(environment.build()))
    bert_tokenizer(folder / "bert-base-uncased")
    settings = {
        "rewards": list(PICTURES_FULL),
        "weights": {"hpsv2.1": "hpsv2.pt", "imagereward": "imagereward.pt"},
        "tokenizers": {"hpsv2.1": "clip", "imagereward": "bert-base-uncased"},
        "pictures": PICTURES_FULL if full else dict.fromkeys(PICTURES_FULL, PICTURES),
        "clip": asdict(clip),
        "blip": asdict(blip),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    environment.run_originals(folder, "seconds", threads)
    seconds: dict[str, dict[str, float]] = json.loads((folder / "seconds.json").read_text())
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the published networks' size; 14 GB of memory")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, row in measure(Path(folder), given.full, given.threads).items():
            print(f"{name}, CPU seconds of {given.threads} thread(s) for {row['pictures']} pictures (times ours):")
            for way in ("fp32", "bf16", "original", "original_one_prompt"):
                print(f"  {way:20} {row[way]:7.2f} ({row[way] / row['fp32']:.2f})")
            print(f"  bf16 differs from fp32 by at most {row['bf16_off']:.1e}")
