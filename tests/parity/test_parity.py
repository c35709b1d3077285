"""The original packages beside ours: the same random weights, pictures and prompts, the same numbers."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import load_reward
from dgpo_plugin.rewards.picture_files import read_picture
from tests.parity import environment
from tests.parity.checkpoints import (
    BlipSize,
    ClipSize,
    bert_tokenizer,
    clip_tokenizer,
    hpsv2_checkpoint,
    imagereward_checkpoint,
    published_words,
)

pytestmark = pytest.mark.slow

SIZES = [(224, 224), (512, 512), (64, 64), (303, 200), (200, 301), (433, 783), (97, 640), (225, 224), (37, 41)]
"""Width and height: square, wide, tall, smaller and larger than 224, and where rounding decides."""
PROMPTS = [
    "a red circle",
    "Two CATS, and the dog's house (photo); 35mm, f/1.8!",
    "“Curly” quotes, an &amp;amp; and a naïve café — ½ of it \U0001f408",
    "  white   space\n\tand\u00a0more  ",
    "words " * 20 + "up to the middle",
    "a very long prompt, " * 40,  # past both limits
    "",
    "x",
    "l'été à la plage, 2024; они 猫と犬",
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that originals.py reads, and its answer, ``scores.json``."""
    folder = tmp_path_factory.mktemp("parity")
    try:
        python = environment.build()
    except environment.IndexUnreachable as error:
        message = f"NOT COMPARED with the original packages, the package index cannot be reached: {error}"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    clip_tokenizer(folder / "clip", published_words(python))
    bert_tokenizer(folder / "bert-base-uncased")
    hpsv2_checkpoint(folder / "v2.pt", ClipSize(), seed=0)
    hpsv2_checkpoint(folder / "v2.1.pt", ClipSize(), seed=1)
    imagereward_checkpoint(folder / "imagereward.pt", BlipSize())
    cases = []
    for place, (size, prompt) in enumerate(zip(SIZES, PROMPTS, strict=True)):
        random = np.random.default_rng(place)
        noise = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(size)
        grain = np.asarray(noise, dtype=np.int16) + random.integers(-40, 41, (size[1], size[0], 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{place}.png")
        cases.append({"file": f"{place}.png", "prompt": prompt})
    (folder / "cases.json").write_text(json.dumps(cases))
    settings = {
        "rewards": ["hpsv2", "hpsv2.1", "imagereward"],
        "weights": {"hpsv2": "v2.pt", "hpsv2.1": "v2.1.pt", "imagereward": "imagereward.pt"},
        "tokenizers": {"hpsv2": "clip", "hpsv2.1": "clip", "imagereward": "bert-base-uncased"},
        "clip": asdict(ClipSize()),
        "blip": asdict(BlipSize()),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    environment.run_originals(folder, "scores")
    return folder


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "imagereward"])
def test_scores_equal_the_original_packages(folder: Path, name: str) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    theirs = json.loads((folder / "scores.json").read_text())[name]
    options = {
        "weights": str(folder / settings["weights"][name]),
        "tokenizer": str(folder / settings["tokenizers"][name]),
    }
    reward = load_reward(name, RewardTerm(options=options))
    values = [
        reward(read_picture(folder / f"{place}.png")[None], [Prompt(prompt)]).item()
        for place, prompt in enumerate(PROMPTS)
    ]
    difference = np.abs(np.array(values) - theirs["original"])
    print(f"{name}: largest difference {difference.max():.1e}, scores {np.ptp(values):.2f} apart")
    assert np.ptp(theirs["original"]) > 0.05  # else everything would be equal
    assert difference.max() < TOLERANCE, difference
    assert np.abs(np.array(theirs["package"]) - theirs["original"]).max() < TOLERANCE  # backend: package
