"""T2I-CompBench's lists are its own, byte for byte, shipped with their license and trained on by nothing shipped."""

from __future__ import annotations

import itertools
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import dgpo_plugin.prompts as prompts_package
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.names import PROMPT_SETS
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.fetched import FETCHED
from dgpo_plugin.prompts.overlap import folded, overlapping
from dgpo_plugin.prompts.registry import load_prompts, prompt_set_names

pytestmark = pytest.mark.fast

LISTS = Path(prompts_package.__file__).parent / "lists" / "t2i-compbench"
PUBLISHED_BYTES = {
    "color": 11_871,
    "shape": 15_935,
    "texture": 14_211,
    "spatial": 9_213,
    "non_spatial": 17_750,
    "complex": 22_724,
}
"""Sizes of Karine-Huang/T2I-CompBench's examples/dataset/*_val.txt, whose lines end in CR LF."""


@pytest.mark.parametrize("kind", PUBLISHED_BYTES)
def test_a_list_has_300_prompts_of_its_kind_and_none_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(urllib.request, "urlopen")  # it is here, not fetched
    prompts = load_prompts(f"t2i-compbench/{kind}")
    assert len(prompts) == 300
    assert [dict(prompt.metadata) for prompt in prompts] == [{"tag": kind}] * 300
    assert [text for text, times in Counter(folded(prompt.text) for prompt in prompts).items() if times > 1] == []
    assert prompts[299].place == f"lists/t2i-compbench/{kind}_val.txt:300"


@pytest.mark.parametrize("kind", PUBLISHED_BYTES)
def test_a_list_is_the_published_file(kind: str) -> None:
    content = (LISTS / f"{kind}_val.txt").read_bytes()
    assert len(content) == PUBLISHED_BYTES[kind]
    assert content.count(b"\n") == content.count(b"\r\n") == (300 if kind in ("shape", "non_spatial") else 299)


def test_lines_stand_where_and_as_they_were_published() -> None:
    """First and last lines, and such as somebody would correct."""
    published = {
        ("color", 1): "a green bench and a blue bowl",
        ("color", 154): "a stop sign and red white line",
        ("color", 270): "two black sheep, a white goat and a white goat in a field",
        ("color", 300): "a black bathroom with a black and white shower curtain",
        ("shape", 19): "an oval sink and a rectangular mirror.",
        ("shape", 238): "an big bathtub and a square showerhead",
        ("shape", 300): "The big house and the small cabin provided different types of accommodations.",
        ("texture", 1): "a plastic toy and a glass bottle",
        ("texture", 25): "a leather shoes and a glass cup",
        ("texture", 300): "The metallic pen and fluffy notebook jot down ideas on the wooden desk.",
        ("spatial", 11): "a bird on side of a airplane",
        ("spatial", 300): "a pig on the bottom of a wallet",
        ("non_spatial", 1): "A person is looking at a rainbow and marveling at its beauty.",
        ("non_spatial", 300): "A child is playing with a toy construction set and building a tower.",
        ("complex", 1): "The red hat was on top of the brown coat rack.",
        ("complex", 268): "The warm, gooey cheese melted deliciously over the pizza, a savory delight.",
    }
    for (kind, line), text in published.items():
        assert load_prompts(f"t2i-compbench/{kind}")[line - 1] == Prompt(text, {"tag": kind})


def test_no_prompt_is_in_another_list_or_in_any_other_shipped_set() -> None:
    kinds = {kind: load_prompts(f"t2i-compbench/{kind}") for kind in PUBLISHED_BYTES}
    for one, other in itertools.combinations(kinds, 2):
        assert overlapping(kinds[one], kinds[other]) == []
    everything = [prompt for prompts in kinds.values() for prompt in prompts]
    others = [name for name in prompt_set_names() if name not in {f"t2i-compbench/{kind}" for kind in kinds}]
    assert {"geneval/train", "ocr/train", "shapes/train", "shapes-2/train", "words/train"} <= set(others)
    for name in others:
        assert overlapping(everything, load_prompts(name)) == [], name


def test_the_lists_stand_beside_their_license() -> None:
    license_text = (LISTS / "LICENSE").read_text()
    assert "https://github.com/Karine-Huang/T2I-CompBench" in license_text
    assert "MIT License\n\nCopyright (c) 2023 HKU\n\nPermission is hereby granted" in license_text
    assert {file.name for file in LISTS.iterdir()} == {"LICENSE", *(f"{kind}_val.txt" for kind in PUBLISHED_BYTES)}


def test_each_is_listed_once_the_shipped_as_shipped_and_the_others_as_fetched() -> None:
    assert set(PROMPT_SETS) & set(FETCHED) == set()
    listed = CliRunner().invoke(main, ["list", "prompts", "t2i-compbench/*"]).output.splitlines()
    assert [line for line in listed if not line.startswith(" ")] == [
        *(f"t2i-compbench/{kind}" for kind in PUBLISHED_BYTES),
        "t2i-compbench/3d_spatial",
        "t2i-compbench/numeracy",
    ]
    assert sum("T2I-CompBench's own 300" in line for line in listed) == 6
    assert sum("fetched; license: MIT" in line for line in listed) == 2
