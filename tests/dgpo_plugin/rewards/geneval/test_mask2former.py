"""The detector: against OpenCV, numpy and the published processor."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.prompts.geneval import OBJECTS
from dgpo_plugin.rewards.geneval.mask2former import class_names, detect, detector_size, instances, prepared
from tests.dgpo_plugin.geneval_networks import LABELS, pictures, tiny_mask2former

pytestmark = pytest.mark.fast


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


def test_the_tiny_detector_against_the_published_processor(tmp_path: Path) -> None:
    """From the picture on: its own resizing, the network, its own post-processing."""
    tiny_mask2former(tmp_path)
    network = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    picture = pictures(2)
    processor = Mask2FormerImageProcessorPil(size={"height": 800, "width": 800})
    inputs = processor(
        [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in picture], return_tensors="pt"
    )
    with torch.no_grad():
        published = processor.post_process_instance_segmentation(network(**inputs), threshold=0.3)
        found = detect(network, list(OBJECTS), picture)
    for mine, theirs in zip(found, published, strict=True):
        assert len(mine) == len(theirs["segments_info"]) > 2
        assert {thing.name for thing in mine} == {"dog"}
        scores = sorted(info["score"] for info in theirs["segments_info"])
        assert sorted(thing.score for thing in mine) == pytest.approx(scores, abs=2e-3)


def test_class_names_are_genevals() -> None:
    labels = {number: LABELS.get(name, name) for number, name in enumerate(OBJECTS)}
    assert class_names(labels) == list(OBJECTS)
    with pytest.raises(UserError, match=r"^has 2 classes, lacks 80 of COCO's 80 \(first: person\)"):
        class_names({0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(UserError, match="^has 81 classes; give"):
        class_names({**labels, 80: "road"})
