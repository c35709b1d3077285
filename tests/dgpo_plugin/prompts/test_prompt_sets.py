"""Prompts by name: what they ask for is in their metadata, and nothing tested is trained on."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

import dgpo_plugin.prompts as prompts_package
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.prompts.geneval import OBJECTS, plural
from dgpo_plugin.prompts.overlap import overlapping
from dgpo_plugin.prompts.registry import load_prompts, prompt_set_names

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", prompt_set_names())
def test_every_prompt_set_is_the_same_every_time_and_has_no_empty_text(name: str) -> None:
    prompts = load_prompts(name)
    assert prompts == load_prompts(name)
    assert all(prompt.text.strip() for prompt in prompts)


SIDES = ("train", "validation", "test")


@pytest.mark.parametrize("kind", ["geneval", "ocr"])
def test_train_validation_and_test_ask_for_nothing_twice(kind: str) -> None:
    sides = {side: load_prompts(f"{kind}/{side}") for side in SIDES}
    for side in SIDES[1:]:
        assert len({p.text for p in sides[side]}) == len(sides[side])
    for one, other in itertools.combinations(SIDES, 2):
        assert overlapping(sides[one], sides[other]) == []


def test_geneval_scenes_are_disjoint_whatever_the_order() -> None:
    def scenes(side: str) -> set[tuple[str, ...]]:
        return {
            (p.metadata["tag"], *sorted(f"{t['class']}{t['count']}{t.get('color')}" for t in p.metadata["include"]))
            for p in load_prompts(f"geneval/{side}")
        }

    for one, other in itertools.combinations(SIDES, 2):
        assert not scenes(one) & scenes(other)
    assert set(Counter(p.metadata["tag"] for p in load_prompts("geneval/validation")).values()) == {24, 60}
    tags = Counter(p.metadata["tag"] for p in load_prompts("geneval/test"))
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert min(tags.values()) >= 8
    assert len(OBJECTS) == 80


def test_geneval_test_is_the_official_list() -> None:
    """Its size and its parts (djghosh13/geneval, prompts/evaluation_metadata.jsonl), and lines seen in copies of it."""
    official = load_prompts("geneval/test")
    assert len(official) == 553
    parts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(prompt.metadata["tag"] for prompt in official) == parts
    assert official[0] == Prompt("a photo of a bench", {"tag": "single_object", "include": [_thing("bench")]})
    by_text = {prompt.text: prompt.metadata for prompt in official}
    assert by_text["a photo of two sandwichs"] == {
        "tag": "counting",
        "include": [_thing("sandwich", 2)],
        "exclude": [_thing("sandwich", 3)],
    }
    assert by_text["a photo of a chair left of a zebra"] == {
        "tag": "position",
        "include": [_thing("zebra"), {**_thing("chair"), "position": ["left of", 0]}],
    }
    assert by_text["a photo of a green surfboard and an orange oven"] == {
        "tag": "color_attr",
        "include": [{**_thing("surfboard"), "color": "green"}, {**_thing("oven"), "color": "orange"}],
    }
    assert {
        "a photo of a pink handbag and a black scissors",
        "a photo of a cow right of a laptop",
        "a photo of a bus below a toothbrush",
        "a photo of four baseball gloves",
        "a photo of a tv remote below a cow",
        "a photo of a white banana and a black elephant",
        "a photo of a purple backpack",
        "a photo of a person and a stop sign",
    } <= set(by_text)


def _thing(name: str, count: int = 1) -> dict[str, Any]:
    return {"class": name, "count": count}


def test_geneval_test_stands_beside_its_license() -> None:
    lists = Path(prompts_package.__file__).parent / "lists"
    assert [folder.name for folder in lists.iterdir() if not (folder / "LICENSE").exists()] == []
    assert "MIT License" in (lists / "geneval" / "LICENSE").read_text()


def test_geneval_task_types_are_trained_on_as_often_as_published() -> None:
    """Position, counting, colour attribution, colours, two objects: 7 : 5 : 3 : 1 : 1 (arXiv 2505.05470, 4.1)."""
    train = load_prompts("geneval/train")
    counts = Counter(p.metadata["tag"] for p in train)
    published = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert counts == {tag: share * len(train) // 17 for tag, share in published.items()}
    assert len(train) % 17 == 0
    for tag in published:  # no scene more often than another, but for the rest
        times = Counter(p.text for p in train if p.metadata["tag"] == tag).values()
        assert max(times) - min(times) <= 1
        assert tag == "counting" or max(times) == 1


def test_geneval_metadata_says_what_the_text_says() -> None:
    for prompt in load_prompts("geneval/train") + load_prompts("geneval/validation"):
        things = prompt.metadata["include"]
        for thing in things:
            name = thing["class"]
            assert (plural(name) if thing["count"] > 1 else name) in prompt.text
            assert thing.get("color", "") in prompt.text
        if prompt.metadata["tag"] == "position":
            relation, target = things[1]["position"]
            looked_for = prompt.text.index(things[1]["class"]), prompt.text.rindex(things[target]["class"])
            assert looked_for[0] < prompt.text.index(relation) < looked_for[1], prompt.text
        if prompt.metadata["tag"] == "counting":
            (asked,), (excluded,) = things, prompt.metadata["exclude"]
            assert excluded == {"class": asked["class"], "count": asked["count"] + 1}


def test_ocr_texts_stand_in_quotes_and_share_no_word() -> None:
    words: dict[str, set[str]] = {}
    for side in SIDES:
        prompts = load_prompts(f"ocr/{side}")
        assert all(f'"{p.metadata["text"]}"' in p.text for p in prompts)
        words[side] = {word for p in prompts for word in p.metadata["text"].split()[:2]}
    tails = {"Today", "Tonight", "Since", "Closed", "Half", "Welcome", "Sold"}
    for one, other in itertools.combinations(SIDES, 2):
        assert not (words[one] - tails) & (words[other] - tails)


def test_the_official_geneval_file_format_loads_unchanged(tmp_path: Path) -> None:
    """A line as the official repositories have it."""
    file = tmp_path / "metadata.jsonl"
    file.write_text(
        '{"tag": "counting", "include": [{"class": "clock", "count": 4}], "exclude": [{"class": "clock", "count": 5}], '
        '"prompt": "a photo of four clocks"}\n'
    )
    (prompt,) = read_prompts(file)
    assert prompt.text == "a photo of four clocks"
    assert prompt.metadata["include"] == [{"class": "clock", "count": 4}]


def test_an_unknown_set_is_named_with_the_near_one() -> None:
    with pytest.raises(UserError, match="no prompt set 'geneval/trian'; did you mean 'geneval/train'"):
        load_prompts("geneval/trian")


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:a/b: needs the datasets package; pip install datasets"):
        load_prompts("hf:a/b")


class Rows(list[dict[str, Any]]):
    """What ``datasets.load_dataset`` returns, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def test_a_datasets_prompts_and_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Rows:
        asked.append((name, split))
        return Rows(
            [{"caption": text, "n": n, "picture": object()} for n, text in enumerate(("a dog", "", "a dog"), 1)]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (prompt,) = load_prompts("hf:owner/name:test")
    assert (prompt.text, prompt.metadata) == ("a dog", {"n": 1})
    assert asked == [("owner/name", "test")]
    with pytest.raises(UserError, match="has no column of prompts; its columns are caption, n, picture; name one"):
        load_prompts("hf:owner/name:test:words")


def test_the_datasets_package_reads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, on files in the layout of a dataset's repository."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"caption": "a dog", "n": 1}, {"caption": "a cat", "n": 2}, {"caption": "a dog", "n": 3}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(f"hf:{folder}:train:caption")
    assert [(prompt.text, prompt.metadata) for prompt in found] == [("a dog", {"n": 1}), ("a cat", {"n": 2})]
    with pytest.raises(UserError, match="has no column of prompts; its columns are caption, n"):
        load_prompts(f"hf:{folder}:train:words")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_prompts(f"hf:{folder}:test")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", r"failed with ZeroDivisionError: division by zero \(at .*own.py:3\)"),
        ("raise SystemExit('bye')", r"failed with SystemExit: bye \(at .*own.py:3\)"),
        ("return 3", "failed with TypeError: 'int' object is not iterable"),
        ("return ['a']", r"must give prompts \(dgpo_plugin.Prompt\), at least one"),
        ("return []", r"must give prompts \(dgpo_plugin.Prompt\), at least one"),
    ],
)
def test_a_function_of_prompts_that_fails_is_one_line(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"from dgpo_plugin import Prompt\ndef prompts():\n    {body}\n")
    with pytest.raises(UserError, match=f"^prompt set {tmp_path}/own.py:prompts: {said}"):
        load_prompts(f"{tmp_path / 'own.py'}:prompts")
