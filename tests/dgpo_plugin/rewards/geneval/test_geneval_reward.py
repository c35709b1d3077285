"""GenEval from pictures: a tiny random Mask2Former and CLIP in real folders, against independent ways to the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.config.load import load_config
from dgpo_plugin.prompts.geneval import COLORS
from dgpo_plugin.rewards import checked_rewards, load_reward
from dgpo_plugin.rewards.geneval.reward import GenEvalReward
from dgpo_plugin.rewards.geneval.rules import Detection
from dgpo_plugin.training.build import build_trainer
from tests.conftest import SMALL, needs_bf16
from tests.dgpo_plugin.geneval_networks import pictures, tiny_clip, tiny_mask2former

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("networks")
    return {"detector": str(tiny_mask2former(root / "detector")), "colors": str(tiny_clip(root / "colors"))}


def load(folders: dict[str, str], name: str = "geneval", **settings: Any) -> GenEvalReward:
    reward = load_reward(name, RewardTerm(options=folders, device="cpu", **settings))
    assert isinstance(reward, GenEvalReward)
    return reward


@pytest.fixture(scope="module")
def reward(folders: dict[str, str]) -> GenEvalReward:
    return load(folders)


def asked(*include: dict[str, Any], tag: str = "single_object") -> Prompt:
    return Prompt("a photo", {"tag": tag, "include": list(include)})


# ---- colors


def cut_square(crop: Image.Image, side: int = 32) -> Image.Image:
    """What open_clip shows its network: Pillow's bicubic filter, then torchvision's middle square, halves to even."""
    shorter = min(crop.size)
    whole = crop.resize((int(side * crop.width / shorter), int(side * crop.height / shorter)), Image.Resampling.BICUBIC)
    left, top = int(round((whole.width - side) / 2.0)), int(round((whole.height - side) / 2.0))  # noqa: RUF046
    return whole.crop((left, top, left + side, top + side))


@pytest.mark.parametrize("box", [(0, 0, 35, 32), (0, 0, 32, 39), (3, 7, 40, 51), (0, 0, 80, 60)])
def test_the_classifier_sees_the_pixels_that_open_clips_would(
    reward: GenEvalReward, box: tuple[int, int, int, int]
) -> None:
    """The first two begin at 1.5 and 3.5 pixels, which go to 2 and 4."""
    picture = pictures(1, 60, 80)[0]
    seen: list[Tensor] = []
    hook = reward.clip.vision_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["pixel_values"] if "pixel_values" in given else args[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        reward.colors_of(picture, [Detection("car", 0.9, box)])
    hook.remove()
    crop = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).crop(box)
    wanted = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(cut_square(crop), return_tensors="pt")
    torch.testing.assert_close(seen[0], wanted.pixel_values, rtol=0, atol=1e-6)


def test_colors_against_pillow_and_the_published_preprocessing(reward: GenEvalReward, folders: dict[str, str]) -> None:
    picture = pictures(1, 60, 80)[0]
    picture[:, :30] = picture[:, :30].round()
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[10:50, 20:60] = True
    mask[20:30, 30:50] = False
    whole = [
        (3.4, 5.6, 70.2, 30.7),
        (0, 0, 20, 20),
        (30, 0, 50, 30),
        (50, 5, 80, 25),
        (0, 35, 30, 60),
        (40, 30, 80, 60),
    ]
    objects = [
        Detection("car", 0.9, (20, 10, 60, 50), mask),
        Detection("car", 0.7, (-4, 30, 30, 90)),  # partly outside
        *(Detection("car", 0.6, box) for box in whole),
    ]
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    masked = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask.numpy()))
    crops = [masked.crop((20, 10, 60, 50)), image.crop((0, 30, 30, 60)), *(image.crop(box) for box in whole)]
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    clip = transformers.CLIPModel.from_pretrained(folders["colors"]).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["colors"])
    expected = []
    for crop in crops:
        similar = []
        for color in COLORS:
            captions = [
                f"a photo of a {color} car",
                f"a photo of a {color}-colored car",
                f"a photo of a {color} object",
            ]
            total = torch.zeros(16)
            for caption in captions:  # one at a time: no padding
                inputs = tokenizer([caption], return_tensors="pt") | processor(cut_square(crop), return_tensors="pt")
                with torch.no_grad():
                    out = clip(**inputs)
                total += out.text_embeds[0] / out.text_embeds[0].norm()
            similar.append(float(out.image_embeds[0] @ total / total.norm()))
        expected.append(COLORS[int(np.argmax(similar))])
    with torch.no_grad():
        assert reward.colors_of(picture, objects) == expected
    assert len(set(expected)) > 2, "a test that tells nothing apart"


# ---- the whole


def test_a_picture_of_too_many_dogs(reward: GenEvalReward, folders: dict[str, str]) -> None:
    batch = pictures(3)
    with torch.no_grad():
        dogs = [len(found) for found in reward.find(batch)]
    assert min(dogs) > 2
    prompts = [
        asked({"class": "dog", "count": 2}),
        asked({"class": "dog", "count": 1}),
        asked({"class": "cat", "count": 1}),
    ]
    expected = [1 - abs(dogs[0] - 2) / 2, 1 - abs(dogs[1] - 1), 0]
    values = checked_rewards(reward, batch, prompts, "geneval")
    assert values.tolist() == pytest.approx(expected)
    assert checked_rewards(load(folders, "geneval-strict"), batch, prompts, "geneval-strict").tolist() == [1, 1, 0]
    one_by_one = load(folders, batch_size=1, offload=True)
    assert checked_rewards(one_by_one, batch, prompts, "geneval").tolist() == pytest.approx(expected)


def test_colors_are_asked_of_the_pictures_own_objects(reward: GenEvalReward) -> None:
    batch = pictures(2)
    with torch.no_grad():
        found = reward.find(batch)
        colors = [reward.colors_of(image, objects) for image, objects in zip(batch, found, strict=True)]
    prompts = [
        asked({"class": "dog", "count": len(objects), "color": names[0]}, tag="colors")
        for objects, names in zip(found, colors, strict=True)
    ]
    expected = [(1 + names.count(names[0]) / len(names)) / 2 for names in colors]
    assert reward(batch, prompts).tolist() == pytest.approx(expected)


def test_another_detector_can_be_put_in(folders: dict[str, str]) -> None:
    reward = load(folders)

    def find(images: Tensor) -> list[list[Detection]]:
        return [[Detection("cat", 0.99, (0, 0, 8, 8)), Detection("dog", 0.99, (30, 0, 38, 8))] for _ in images]

    reward.find = find
    wanted = asked(
        {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}, tag="position"
    )
    wrong = asked({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}, tag="position")
    assert reward(pictures(2), [wanted, wrong]).tolist() == [1, 0.75]


@needs_bf16
def test_half_precision(folders: dict[str, str]) -> None:
    half = load(folders, precision="bf16")
    values = half(pictures(1), [asked({"class": "dog", "count": 1, "color": "red"}, tag="colors")])
    assert values.dtype == torch.float32
    assert values.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"detector": "{colors}"},
            r"\(option detector\): is a clip, not a mask2former; give a Mask2For",
        ),
        (
            {"colors": "{detector}"},
            r"\(option colors\): is a mask2former, not a clip; give a CLIPModel",
        ),
        ({"detector": "{empty}"}, r"\(option detector\): cannot be loaded .*fetch it first"),
        ({"colors": "{untold}"}, "its tokenizer is missing or not its own; fetch the whole folder"),
        ({"detector": "facebook/mask2former-swin-small-coco-instance"}, "-instance .*cannot be loaded"),
        ({"strict": True}, "geneval: has no option 'strict'"),
    ],
)
def test_what_cannot_be_loaded(folders: dict[str, str], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    no_tokenizer = shutil.ignore_patterns("*token*", "vocab*", "merges*")
    shutil.copytree(folders["colors"], tmp_path / "untold", ignore=no_tokenizer)
    places = {**folders, "empty": tmp_path / "empty", "untold": tmp_path / "untold"}
    given = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        load({**folders, **given})
    assert "\n" not in str(caught.value)


def test_weights_that_lack_something(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(folders["detector"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("class_predictor.weight")
    tensors.pop("criterion.empty_weight")  # only training has a use for it
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(first: class_predictor.weight\)"):
        load({**folders, "detector": str(tmp_path)})


def test_prompts_without_metadata_are_refused(reward: GenEvalReward) -> None:
    prompts: Sequence[Prompt] = [asked({"class": "dog", "count": 1}), Prompt("a dog")]
    with pytest.raises(UserError, match="prompt 'a dog' has no GenEval metadata"):
        reward(pictures(2), prompts)


def test_an_iteration_of_training(folders: dict[str, str]) -> None:
    """Prompts, pictures and metadata as a run brings them together."""
    options = [f"rewards.geneval.options.{key}={value}" for key, value in folders.items()]
    config = load_config(
        "shapes", [*SMALL, "prompts={train: geneval/train, held_out: geneval/test}", "rewards=geneval", *options]
    )
    metrics = next(build_trainer(config).iterations())
    assert -14 <= metrics["reward"] <= 1
