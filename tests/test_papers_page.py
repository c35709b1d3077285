"""docs/papers.md names presets that exist, of the algorithm in their row, and every algorithm."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

import pytest

from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.load import load_config, preset_names, preset_says

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
KINDS = ("-unguided", "-old-policy", "-large-card")


def rows() -> list[list[str]]:
    """(paper, algorithm, presets, what was seen) of each row."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def presets_of(cell: str) -> list[str]:
    named = re.findall(r"`([^`]+)`", cell)
    plain = [name for name in named if not name.startswith("-")]
    return [*plain, *(name + kind for name, kind in itertools.product(plain, KINDS) if f"`{kind}`" in cell)]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(",")[0])
def test_a_rows_presets_exist_and_are_of_its_algorithm_and_paper(row: list[str]) -> None:
    paper, algorithm, cell, _ = row
    name = re.findall(r"`([^`]+)`", algorithm)[0]
    assert presets_of(cell)
    for preset in presets_of(cell):
        assert load_config(preset).algorithm.name == name, preset
        if number := re.search(r"\d{4}\.\d{5}", paper):
            assert number.group() in " ".join(preset_says(preset_names()[preset])) or preset.endswith(KINDS), preset
    if number := re.search(r"\d{4}\.\d{5}", paper):
        module = importlib.import_module(ALGORITHMS.get(name).target.partition(":")[0])
        assert number.group() in (module.__doc__ or ""), paper


def test_every_algorithm_and_every_published_preset_has_its_row() -> None:
    named = {re.findall(r"`([^`]+)`", algorithm)[0] for _, algorithm, _, _ in rows()}
    assert named == set(ALGORITHMS)
    shown = {preset for _, _, cell, _ in rows() for preset in presets_of(cell)}
    assert {name for name in preset_names() if name.startswith("sd35-") or name.endswith("-unconfirmed")} == shown


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_numbers_its_deviations(name: str) -> None:
    module = importlib.import_module(ALGORITHMS.get(name).target.partition(":")[0])
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", module.__doc__ or "", re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 1
