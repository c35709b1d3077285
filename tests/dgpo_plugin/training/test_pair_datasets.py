"""Preferred pairs in a dataset, read by the real package from files in the layout of a dataset's repository."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training.pair_datasets import _rows
from dgpo_plugin.training.pair_files import read_fitted, read_pairs

pytestmark = pytest.mark.fast
SIDE = 8
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def coded(color: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _rows.cache_clear()


def dataset(folder: Path, pictures: Sequence[str] = (), **columns: list[Any]) -> str:
    """A dataset's folder with the rows; some columns are pictures, others as they are."""
    rows = datasets.Dataset.from_dict(columns)
    for column in pictures:
        rows = rows.cast_column(column, datasets.Image())
    (folder / "data").mkdir()
    rows.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return f"hf:{folder / 'data'}"


def colors(source: str) -> list[tuple[str, int, int]]:
    """Of each pair the prompt, and which color is the strongest in the chosen and the rejected picture."""
    pairs, _ = read_pairs(source, SIDE, SIDE)
    found = []
    for pair in pairs:
        one, other = (
            read_fitted(file, seen, pair.prompt.place, SIDE, SIDE)
            for file, seen in zip(pair.files, pair.hashes, strict=True)
        )
        found.append((pair.prompt.text, int(one[:, 0, 0].argmax()), int(other[:, 0, 0].argmax())))
    return found


@pytest.mark.parametrize("pictures", [("chosen", "rejected"), ()], ids=["as pictures", "as bytes"])
def test_chosen_and_rejected(tmp_path: Path, pictures: Sequence[str]) -> None:
    source = dataset(
        tmp_path, pictures, prompt=["a", "b"], chosen=[coded(RED), coded(GREEN)], rejected=[coded(BLUE), coded(RED)]
    )
    assert colors(source) == [("a", 0, 2), ("b", 1, 0)]
    assert colors(f"{source}:train[1:]") == [("b", 1, 0)]


def test_two_pictures_and_which_was_preferred(tmp_path: Path) -> None:
    """Pick-a-Pic's columns; a half is a tie."""
    source = dataset(
        tmp_path,
        caption=["a", "b", "c", "d"],
        jpg_0=[coded(RED)] * 4,
        jpg_1=[coded(BLUE)] * 4,
        label_0=[1.0, 0.0, 0.5, None],
        best_image_uid=["x"] * 4,
    )
    assert colors(source) == [("a", 0, 2), ("b", 2, 0)]
    _, lines = read_pairs(source, SIDE, SIDE)
    assert lines == [f"2 of 4 rows of {source} prefer neither picture and are left out"]
    larger, lines = read_pairs(source, 2 * SIDE, 2 * SIDE)
    assert len(larger) == 2
    assert "are resized and cropped in the middle to 16 x 16 (first: " in lines[1]


def said(source: str) -> str:
    with pytest.raises(UserError) as caught:
        read_pairs(source, SIDE, SIDE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_rows_that_are_no_pair_are_named(tmp_path: Path) -> None:
    source = dataset(
        tmp_path,
        prompt=["a", "", "c", "d"],
        chosen=[b"no picture", coded(RED), None, coded(RED)],
        rejected=[coded(RED), coded(RED), coded(RED), coded(RED)],
    )
    text = said(source)
    assert f"{source} row 0, chosen: not a picture that can be read" in text
    assert f"{source} row 1: has no prompt under prompt" in text
    assert f"{source} row 2, chosen: holds no picture" in text
    assert f"{source} row 3: chosen and rejected are the same picture" in text


def test_a_dataset_of_something_else_says_what_it_lacks(tmp_path: Path) -> None:
    source = dataset(tmp_path, prompt=["a"], jpg_0=[coded(RED)], jpg_1=[coded(BLUE)])
    assert said(source) == (
        f"{source}: has no pairs of pictures: needs a column prompt with chosen and rejected, or with jpg_0, jpg_1 and "
        "label_0; its columns are prompt, jpg_0, jpg_1"
    )
    assert "cannot be loaded" in said(f"{source}:test")
    only_ties = tmp_path / "ties"
    only_ties.mkdir()
    tied = dataset(only_ties, prompt=["a"], jpg_0=[coded(RED)], jpg_1=[coded(BLUE)], label_0=[0.5])
    assert said(tied) == f"{tied}: holds no pair; write at least one"


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert said("hf:owner/name") == "hf:owner/name: needs the datasets package; pip install datasets"


def test_a_picture_that_changed_is_noticed(tmp_path: Path) -> None:
    source = dataset(tmp_path, prompt=["a"], chosen=[coded(RED)], rejected=[coded(BLUE)])
    (pair,), _ = read_pairs(source, SIDE, SIDE)
    picture = read_fitted(pair.chosen, pair.hashes[0], pair.prompt.place, SIDE, SIDE)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(RED) / 255)
    with pytest.raises(UserError, match="row 0, chosen is another picture than when the run began; put it back"):
        read_fitted(pair.chosen, pair.hashes[1], pair.prompt.place, SIDE, SIDE)
