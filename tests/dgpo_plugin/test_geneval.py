"""GenEval from pictures: a tiny random Mask2Former and CLIP in real folders, against independent ways to the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from dgpo_plugin.config import RewardConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.prompt_sets.geneval import COLOURS, OBJECTS
from dgpo_plugin.prompts import Prompt
from dgpo_plugin.rewards import checked_rewards, load_reward
from dgpo_plugin.rewards.geneval import GenEvalReward
from dgpo_plugin.rewards.geneval_rules import Detection
from dgpo_plugin.rewards.mask2former import class_names, detector_size, instances, prepared
from tests.dgpo_plugin.families import SHAPES

pytestmark = pytest.mark.fast

LABELS = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "couch": "sofa"}
"""Some of the hub's spellings."""


def tiny_mask2former(folder: Path, *, sure_of: str = "dog") -> Path:
    """All of whose queries find one class, in places that depend on the picture."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={number: LABELS.get(name, name) for number, name in enumerate(OBJECTS)},
    )
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    network.class_predictor.bias.data[OBJECTS.index(sure_of)] = 8.0
    network.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHAPES / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=4.0)
    network = transformers.CLIPModel(config)
    for parameter in network.vision_model.encoder.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4  # so that different pictures get different colours
    network.save_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("networks")
    return {"detector": str(tiny_mask2former(root / "detector")), "colours": str(tiny_clip(root / "colours"))}


def load(folders: dict[str, str], name: str = "geneval", **settings: Any) -> GenEvalReward:
    reward = load_reward(RewardConfig(name=name, options={name: folders}, device="cpu", **settings))
    assert isinstance(reward, GenEvalReward)
    return reward


@pytest.fixture(scope="module")
def reward(folders: dict[str, str]) -> GenEvalReward:
    return load(folders)


def pictures(number: int, height: int = 48, width: int = 48) -> Tensor:
    """Smooth and 8-bit."""
    coarse = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def asked(*include: dict[str, Any], tag: str = "single_object") -> Prompt:
    return Prompt("a photo", {"tag": tag, "include": list(include)})


# ---- the detector


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 451), (1024, 768), (200, 900), (3, 7)])
def test_pictures_are_prepared_as_opencv_and_numpy_do_it(height: int, width: int) -> None:
    picture = pictures(1, height, width)
    size = detector_size(height, width)
    assert min(size) <= 800
    assert max(size) <= 1333
    assert min(size) == 800 or max(size) == 1333
    pixels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    expected = np.full((-(-size[0] // 32) * 32, -(-size[1] // 32) * 32, 3), 128.0)
    expected[: size[0], : size[1]] = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    expected = (expected - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]  # mmdet's numbers
    got = prepared(picture, size)[0].permute(1, 2, 0).numpy()
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1.01 / 57  # one step of 8 bits: OpenCV's weights have 11
    assert np.abs(got - expected).mean() < 0.15 / 57
    assert np.abs(got - expected)[size[0] :].max(initial=0) < 1e-6
    assert np.abs(got - expected)[:, size[1] :].max(initial=0) < 1e-6


def test_instances_are_those_of_the_published_processor() -> None:
    """At its size, 384 pixels, where the two differ in nothing."""
    generator = torch.Generator().manual_seed(0)
    class_logits = 4 * torch.randn(1, 100, 81, generator=generator)
    coarse = torch.randn(1, 100, 8, 8, generator=generator) - 1
    mask_logits = torch.nn.functional.interpolate(coarse, (96, 96), mode="bilinear") * 5
    mask_logits[0, :3] = -1  # three find nothing
    output = transformers.models.mask2former.modeling_mask2former.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits
    )
    published = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.1, return_binary_maps=True
    )[0]
    expected = {
        (OBJECTS[info["label_id"]], round(info["score"], 4)): mask.bool()
        for info, mask in zip(published["segments_info"], published["segmentation"], strict=True)
    }
    got = instances(class_logits[0], mask_logits[0], list(OBJECTS), (384, 384), (384, 384), least=0.1)
    assert len(got) > 10
    assert {(found.name, round(found.score, 4)) for found in got} == set(expected)
    for found in got:
        mask = expected[found.name, round(found.score, 4)]
        assert found.mask is not None
        assert torch.equal(found.mask, mask)
        rows, columns = np.nonzero(mask.numpy())
        assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_query_that_is_sure_of_a_rectangle_gives_its_box() -> None:
    """Through padding and back to the picture's size."""
    picture, size = (300, 451), detector_size(300, 451)
    padded = [-(-side // 32) * 32 for side in size]
    scale = size[0] / picture[0]
    rows, columns = (torch.arange(side // 4) * 4 + 2 for side in padded)
    inside = ((rows > 60 * scale) & (rows < 240 * scale))[:, None] & (
        (columns > 100 * scale) & (columns < 400 * scale)
    )[None]
    class_logits = torch.full((1, 81), -9.0)
    class_logits[0, OBJECTS.index("zebra")] = 9
    (found,) = instances(class_logits, torch.where(inside, 9.0, -9.0)[None], list(OBJECTS), size, picture)
    assert found.name == "zebra"
    assert found.score > 0.95
    assert found.box == pytest.approx((100, 60, 400, 240), abs=2)
    assert found.mask is not None
    assert found.mask.shape == picture


def test_no_query_is_sure() -> None:
    assert instances(torch.zeros(5, 81), torch.ones(5, 8, 8), list(OBJECTS), (32, 32), (32, 32)) == []


def test_the_tiny_detector_against_the_published_processor(reward: GenEvalReward) -> None:
    """From the picture on: its own resizing, the network, its own post-processing."""
    network = reward.network["detector"]  # type: ignore[index]
    picture = pictures(2)
    processor = Mask2FormerImageProcessorPil(size={"height": 800, "width": 800})
    inputs = processor(
        [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in picture], return_tensors="pt"
    )
    with torch.no_grad():
        published = processor.post_process_instance_segmentation(network(**inputs), threshold=0.3)
        found = reward.find(picture)
    for mine, theirs in zip(found, published, strict=True):
        assert len(mine) == len(theirs["segments_info"]) > 2
        assert {thing.name for thing in mine} == {"dog"}
        scores = sorted(info["score"] for info in theirs["segments_info"])
        assert sorted(thing.score for thing in mine) == pytest.approx(scores, abs=2e-3)


def test_class_names_are_genevals() -> None:
    labels = {number: LABELS.get(name, name) for number, name in enumerate(OBJECTS)}
    assert class_names(labels, "x") == list(OBJECTS)
    with pytest.raises(UserError, match=r"x: has 2 classes, lacks 80 of COCO's 80 \(first: person\)"):
        class_names({0: "LABEL_0", 1: "LABEL_1"}, "x")
    with pytest.raises(UserError, match="x: has 81 classes; give"):
        class_names({**labels, 80: "road"}, "x")


# ---- colours


def test_colours_against_pillow_and_the_published_processor(reward: GenEvalReward, folders: dict[str, str]) -> None:
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
    crops = [masked.crop((20, 10, 60, 50)), image.crop((0, 30, 30, 60)), *(image.crop(box) for box in whole)]  # type: ignore[arg-type]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    clip = transformers.CLIPModel.from_pretrained(folders["colours"]).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["colours"])
    expected = []
    for crop in crops:
        similar = []
        for colour in COLOURS:
            captions = [
                f"a photo of a {colour} car",
                f"a photo of a {colour}-colored car",
                f"a photo of a {colour} object",
            ]
            total = torch.zeros(16)
            for caption in captions:  # one at a time: no padding
                inputs = tokenizer([caption], return_tensors="pt") | processor(crop, return_tensors="pt")
                with torch.no_grad():
                    out = clip(**inputs)
                total += out.text_embeds[0] / out.text_embeds[0].norm()
            similar.append(float(out.image_embeds[0] @ total / total.norm()))
        expected.append(COLOURS[int(np.argmax(similar))])
    with torch.no_grad():
        assert reward.colours_of(picture, objects) == expected
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


def test_colours_are_asked_of_the_pictures_own_objects(reward: GenEvalReward) -> None:
    batch = pictures(2)
    with torch.no_grad():
        found = reward.find(batch)
        colours = [reward.colours_of(image, objects) for image, objects in zip(batch, found, strict=True)]
    prompts = [
        asked({"class": "dog", "count": len(objects), "color": names[0]}, tag="colors")
        for objects, names in zip(found, colours, strict=True)
    ]
    expected = [(1 + names.count(names[0]) / len(names)) / 2 for names in colours]
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


def test_half_precision(folders: dict[str, str]) -> None:
    half = load(folders, precision="bf16")
    values = half(pictures(1), [asked({"class": "dog", "count": 1, "color": "red"}, tag="colors")])
    assert values.dtype == torch.float32
    assert values.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"detector": "{colours}"},
            r"\(reward.options.geneval.detector\): is a clip, not a mask2former; give a Mask2For",
        ),
        (
            {"colours": "{detector}"},
            r"\(reward.options.geneval.colours\): is a mask2former, not a clip; give a CLIPModel",
        ),
        ({"detector": "{empty}"}, r"\(reward.options.geneval.detector\): cannot be loaded .*fetch it beforehand"),
        ({"colours": "{untold}"}, "its tokenizer is missing or not its own; fetch the whole folder"),
        ({"detector": "facebook/mask2former-swin-small-coco-instance"}, "-instance .*cannot be loaded"),
        ({"strict": True}, "geneval has no option 'strict'"),
    ],
)
def test_what_cannot_be_loaded(folders: dict[str, str], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    no_tokenizer = shutil.ignore_patterns("*token*", "vocab*", "merges*")
    shutil.copytree(folders["colours"], tmp_path / "untold", ignore=no_tokenizer)
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
