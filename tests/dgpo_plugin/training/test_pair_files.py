"""Preferred pairs on disk: what is read, and what is said of those that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training.pair_files import fitted, overlap, pairs_hash, read_fitted, read_pairs

pytestmark = pytest.mark.fast

SIDE = 32


def draw(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, color)
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path / "a.png", (200, 0, 0))
    draw(tmp_path / "b.png", (0, 200, 0))
    draw(tmp_path / "c.png", (0, 0, 200))
    return tmp_path


def said(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_pairs(str(path), SIDE, SIDE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_and_the_folder_it_lies_in(folder: Path, kind: str) -> None:
    table = folder / f"pairs.{kind}"
    if kind == "csv":
        table.write_text('prompt,chosen,rejected,votes\n"a red, red square",a.png,b.png,3\nblue,c.png,a.png,1\n')
    else:
        rows = [
            {"prompt": "a red, red square", "chosen": "a.png", "rejected": "b.png", "votes": "3"},
            {"prompt": "blue", "chosen": "c.png", "rejected": "a.png", "votes": "1"},
        ]
        table.write_text("\n".join(json.dumps(row) for row in rows))
    pairs, lines = read_pairs(str(table), SIDE, SIDE)
    assert [(pair.prompt.text, pair.chosen.name, pair.rejected.name) for pair in pairs] == [
        ("a red, red square", "a.png", "b.png"),
        ("blue", "c.png", "a.png"),
    ]
    assert pairs[0].prompt.metadata == {"votes": "3"}
    assert lines == []
    assert read_pairs(str(folder), SIDE, SIDE)[0] == pairs


def test_a_folder_for_each_prompt(tmp_path: Path) -> None:
    draw(tmp_path / "a red square" / "chosen.png", (200, 0, 0))
    draw(tmp_path / "a red square" / "rejected-1.png", (0, 200, 0))
    draw(tmp_path / "a red square" / "rejected-2.png", (0, 0, 200))
    draw(tmp_path / "second" / "Chosen.png", (200, 0, 200))
    draw(tmp_path / "second" / "rejected.webp", (200, 200, 0))
    (tmp_path / "second" / "prompt.txt").write_text("what/ever you say\n")
    pairs, _ = read_pairs(str(tmp_path), SIDE, SIDE)
    assert [(pair.prompt.text, pair.rejected.name) for pair in pairs] == [
        ("a red square", "rejected-1.png"),
        ("a red square", "rejected-2.png"),
        ("what/ever you say", "rejected.webp"),
    ]


def test_all_mistakes_of_a_table_are_told_at_once(folder: Path) -> None:
    draw(folder / "tiny.png", (1, 2, 3), (8, 8))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    Image.open(folder / "a.png").save(folder / "again.bmp")
    table = folder / "pairs.csv"
    rows = ["x,a.png,gone.png", "x,broken.png,a.png", "x,tiny.png,b.png", "x,a.png,again.bmp", "x,,b.png"]
    table.write_text("prompt,chosen,rejected\n" + "\n".join(rows) + "\n")
    told = said(table)
    assert f"{table}:6: names no picture under chosen" in told
    assert f"{table}:2: {folder / 'gone.png'}: No such file or directory" in told
    assert f"{table}:3: {folder / 'broken.png'}: not a picture that can be read" in told
    assert f"{table}:4: {folder / 'tiny.png'} has 8 x 8 pixels, which would be enlarged more than 2 times" in told
    assert f"{table}:5: a.png and again.bmp are the same picture" in told


def test_all_mistakes_of_prompts_folders_are_told_at_once(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "chosen.png", (200, 0, 0))
    (tmp_path / "none").mkdir()
    for name in ("a.png", "b.png"):
        draw(tmp_path / "unpreferred" / name, (len(name), 200, ord(name[0])))
    draw(tmp_path / "unrejected" / "chosen-1.png", (0, 200, 0))
    draw(tmp_path / "unrejected" / "chosen-2.png", (0, 210, 0))
    told = said(tmp_path)
    assert f"{tmp_path / 'one'}: has one picture; a pair needs two of its prompt" in told
    assert f"{tmp_path / 'none'}: has no picture; a pair needs two of its prompt" in told
    assert f"{tmp_path / 'unpreferred'}: none is preferred; begin the names of the better pictures with chosen" in told
    assert f"{tmp_path / 'unrejected'}: none is rejected" in told


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds neither a table pairs.csv"),
        ({"pairs.csv": "prompt,chosen,rejected\n"}, "holds no prompt"),
        ({"pairs.csv": "prompt,chosen\nx,a.png\n"}, "names no picture under rejected"),
        ({"pairs.csv": "prompt,chosen,rejected\nx,a.png,b.png\n", "pairs.jsonl": "{}"}, "name the one that is meant"),
        ({"pairs.csv": "text;better\n"}, "holds no prompt"),
    ],
)
def test_folders_without_pairs(folder: Path, files: dict[str, str], says: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    assert says in said(folder)


def test_places_where_nothing_is(tmp_path: Path) -> None:
    assert said(tmp_path / "gone") == f"{tmp_path / 'gone'}: no such file or folder; check the path"
    assert "no such" in said(tmp_path / "gone.csv").lower()
    (tmp_path / "pairs.xlsx").write_text("x")
    assert "the name must end in .csv" in said(tmp_path / "pairs.xlsx")


def test_other_sizes_are_fitted_and_said(folder: Path) -> None:
    draw(folder / "wide.png", (200, 100, 0), (96, 48))
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\nx,wide.png,a.png\n")
    pairs, (line,) = read_pairs(str(folder), SIDE, SIDE)
    assert line == (
        f"1 of 2 pictures of {folder} are resized and cropped in the middle to 32 x 32 "
        f"(first: {folder / 'wide.png'}, 96 x 48)"
    )
    assert read_fitted(pairs[0].chosen, pairs[0].hashes[0], "", SIDE, SIDE).shape == (3, SIDE, SIDE)


def test_a_picture_is_cropped_in_the_middle() -> None:
    stripes = torch.zeros(3, 16, 48)
    stripes[:, :, 16:32] = 1
    assert torch.equal(fitted(stripes, 16, 16), torch.ones(3, 16, 16))
    halved = fitted(torch.rand(3, 64, 64), 32, 32)
    assert halved.shape == (3, 32, 32)


def test_a_hash_is_of_prompts_and_of_what_is_seen(folder: Path) -> None:
    table = folder / "pairs.csv"

    def of(rows: str) -> str:
        table.write_text("prompt,chosen,rejected\n" + rows)
        return pairs_hash(read_pairs(str(table), SIDE, SIDE)[0])

    first = of("x,a.png,b.png\n")
    Image.open(folder / "a.png").save(folder / "other.bmp")
    assert of("x,other.bmp,b.png\n") == first
    assert len({first, of("x,b.png,a.png\n"), of("y,a.png,b.png\n"), of("x,a.png,c.png\n")}) == 4


def test_a_picture_that_changed_in_the_middle_of_a_run_is_refused(folder: Path) -> None:
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\nx,a.png,b.png\n")
    (pair,), _ = read_pairs(str(folder), SIDE, SIDE)
    draw(folder / "a.png", (9, 9, 9))
    with pytest.raises(UserError, match=r"a\.png is another picture than when the run began"):
        read_fitted(pair.chosen, pair.hashes[0], "pairs.csv:2", SIDE, SIDE)


def test_held_out_pairs_that_are_trained_on_are_found(folder: Path) -> None:
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\nx,a.png,b.png\ny,a.png,c.png\n")
    pairs, _ = read_pairs(str(folder), SIDE, SIDE)
    (folder / "other.csv").write_text("prompt,chosen,rejected\nx,b.png,a.png\nx,a.png,c.png\n")
    held_out, _ = read_pairs(str(folder / "other.csv"), SIDE, SIDE)
    assert overlap(pairs, held_out) == held_out[:1]
