"""Which pictures are scored, in which order, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.rewards.picture_folders import find_pictures, natural_key, suffixes

pytestmark = pytest.mark.fast


def picture(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level,) * 3).save(path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png", "2.png", "10.png", "11.png"],
        ["img_1.png", "img_2.png", "img_10.png", "img_100.png"],
        ["000.png", "1.png", "002.png", "10.png"],
        ["a.png", "a1.png", "a2.png", "a10.png", "b.png"],
        ["prompt 2 seed 9.png", "prompt 2 seed 10.png", "prompt 10 seed 1.png"],
        ["A1.png", "a2.png", "A3.png"],
        ["1-2.png", "1-10.png", "2-1.png"],
        ["x1.jpg", "x1.png", "x2.jpg"],
        ["ComfyUI_00009_.png", "ComfyUI_00010_.png", "ComfyUI_100000_.png"],
        ["9" * 60 + ".png", "1" + "0" * 60 + ".png"],
    ],
)
def test_names_stand_in_the_order_in_which_people_count(tmp_path: Path, names: list[str]) -> None:
    for name in reversed(names):
        picture(tmp_path / name)
    assert [path.name for path in find_pictures([tmp_path]).pictures] == names


def test_folders_of_a_path_count_too() -> None:
    names = ("run10/1.png", "run2/10.png", "run2/9.png")
    assert sorted(map(Path, names), key=natural_key) == [Path(name) for name in names[::-1]]


def test_files_stay_as_they_are_given_and_folders_one_after_the_other(tmp_path: Path) -> None:
    made = [picture(tmp_path / name) for name in ("b/2.png", "b/10.png", "a/1.png", "z.png", "c.png")]
    found = find_pictures([tmp_path / "b", tmp_path / "z.png", tmp_path / "c.png", tmp_path / "a"])
    assert found.pictures == [made[0], made[1], made[3], made[4], made[2]]
    assert found.by_hand == [made[3], made[4]]


def test_what_is_skipped_is_said(tmp_path: Path) -> None:
    for name in ("1.PNG", "2.webp", "._1.png", ".hidden.png", "thumbs/1.png"):
        picture(tmp_path / name)
    for name in (".DS_Store", "prompts.txt", "notes.md", "scores.csv", "x.safetensors"):
        (tmp_path / name).write_text("x")
    found = find_pictures([tmp_path])
    assert [path.name for path in found.pictures] == ["1.PNG", "2.webp"]
    assert found.skipped == [
        f"{tmp_path}: skipped other formats (notes.md, prompts.txt, scores.csv and 1 more), "
        "hidden (._1.png, .DS_Store, .hidden.png), folders (thumbs)"
    ]
    assert find_pictures([tmp_path / "1.PNG"]).skipped == []


def test_everything_that_is_read_here_is_found_and_nothing_that_runs_another_program() -> None:
    common = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga", ".ico"}
    assert common <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".h5", ".txt", ".json", ""}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no picture; check the path"),
        (["notes.txt"], "holds no picture; check the path"),
        ([".a.png"], "holds no picture; check the path"),
        (["one/a.png", "two/a.png"], r"holds no picture, and 2 folders \(first: one\); name these"),
    ],
)
def test_a_folder_without_pictures(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_pictures([tmp_path])


# ---- GenEval's layout


def geneval(folder: Path, prompts: int = 12, samples: int = 2) -> None:
    """As djghosh13/geneval's ``generation/diffusers_generate.py`` writes it, its overview picture included."""
    for number in range(prompts):
        own = folder / f"{number:0>5}"
        for sample in range(samples):
            picture(own / "samples" / f"{sample:05}.png")
        picture(own / "grid.png")
        metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": f"bench {number}"}
        (own / "metadata.jsonl").write_text(json.dumps(metadata))


def test_genevals_layout_is_read_as_it_is(tmp_path: Path) -> None:
    geneval(tmp_path)
    (tmp_path / "results.jsonl").write_text("{}")
    (tmp_path / "00003" / "samples" / "notes.txt").write_text("")
    found = find_pictures([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found.pictures[:3]] == [
        "00000/samples/00000.png",
        "00000/samples/00001.png",
        "00001/samples/00000.png",
    ]
    assert len(found.pictures) == 24
    assert [found.prompts[path].text for path in found.pictures[-3:]] == ["bench 10", "bench 11", "bench 11"]
    assert found.prompts[found.pictures[0]].metadata["include"] == [{"class": "bench", "count": 1}]
    assert found.skipped == [f"{tmp_path}: skipped other files (notes.txt, results.jsonl)"]


def test_one_prompts_folder_and_short_names(tmp_path: Path) -> None:
    geneval(tmp_path, prompts=1, samples=0)
    for name in ("2.png", "10.png"):
        picture(tmp_path / "00000" / "samples" / name)
    found = find_pictures([tmp_path / "00000"])
    assert [path.name for path in found.pictures] == ["2.png", "10.png"]
    assert {prompt.text for prompt in found.prompts.values()} == {"bench 0"}


@pytest.mark.parametrize(
    ("metadata", "samples", "message"),
    [
        ("", True, "holds no prompt"),
        ("{", True, "not JSON"),
        ('{"tag": "x"}', True, "text under"),
        ('{"prompt": "a"}\n{"prompt": "b"}', True, "2 prompts; GenEval's folders have one each"),
        ('{"prompt": "a"}', False, "00000: has no folder samples"),
    ],
)
def test_a_broken_folder_of_genevals(tmp_path: Path, metadata: str, samples: bool, message: str) -> None:
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text(metadata)
    if samples:
        picture(tmp_path / "00000" / "samples" / "0.png")
    with pytest.raises(UserError, match=message):
        find_pictures([tmp_path])


def test_a_link_whose_picture_is_gone_is_not_skipped(tmp_path: Path) -> None:
    """It is a picture that cannot be read, and has its empty cell."""
    (tmp_path / "0.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "1.png").mkdir()
    found = find_pictures([tmp_path])
    assert found.pictures == [tmp_path / "0.png"]
    assert found.skipped == [f"{tmp_path}: skipped folders (1.png)"]


def test_a_prompt_that_has_no_pictures_yet_is_said(tmp_path: Path) -> None:
    geneval(tmp_path, prompts=2, samples=1)
    (tmp_path / "00001" / "samples" / "00000.png").unlink()
    found = find_pictures([tmp_path])
    assert len(found.pictures) == 1
    assert found.skipped == [f"{tmp_path}: skipped folders (00001)"]
