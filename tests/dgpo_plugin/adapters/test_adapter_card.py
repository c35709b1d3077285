"""The card of any file: what it says of itself, and nothing that it forges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.tables import as_table
from tests.dgpo_plugin.adapters.adapter_files import changed, headed

pytestmark = pytest.mark.fast


def test_the_rows_are_the_fields_in_their_order(good: Path) -> None:
    card = AdapterCard.of(read_adapter(good))
    labels = [label for label, _ in card.rows()]
    assert labels[:4] == ["file", "title", "base model", "base weights"]
    assert labels[-4:] == ["license", "config hash", "content hash", "packages"]
    assert dict(card.rows())["optimizer steps"] == card.optimizer_steps == "1"
    assert card.rank == "2"
    assert card.reward_before == "-", "it was not measured"
    assert card.license == "not stated in the file"


def test_the_card_of_a_half_precision_file_with_a_hash(good: Path, tmp_path: Path) -> None:
    """numpy has no bfloat16: the card once died of it."""
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, header)
    assert "DOES NOT MATCH" in AdapterCard.of(read_adapter(path)).content_hash


def test_a_header_cannot_forge_a_row_or_speak_to_the_terminal(good: Path, tmp_path: Path) -> None:
    forged = "nice\nreward after   9.9\x1b[2J\u202e"
    path = headed(good, tmp_path, **{"modelspec.title": forged, "dgpo.reward": "\r\x07"})
    card = as_table(AdapterCard.of(read_adapter(path)).rows())
    assert card.count("reward after") == 2  # its own row, and the words inside the title's
    assert not any(line.startswith("reward after   9.9") for line in card.splitlines())
    assert all(character.isprintable() or character == "\n" for character in card)


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        ({"lora_adapter_metadata": "[" * 100_000}, "scale", "not JSON"),
        ({"lora_adapter_metadata": json.dumps({"alpha_pattern": {"(a+)+$": 1}})}, "scale", "repeats a group"),
        ({"lora_adapter_metadata": json.dumps({"lora_alpha": 10**400})}, "scale", "no usable alpha"),
        ({"dgpo.packages": "[" * 100_000}, "packages", "cannot be read"),
        ({"dgpo.packages": "[1]"}, "packages", "cannot be read"),
    ],
)
def test_a_strange_header_is_a_row_of_the_card_and_no_traceback(
    good: Path, tmp_path: Path, header: dict[str, str], row: str, told: str
) -> None:
    assert told in dict(AdapterCard.of(read_adapter(headed(good, tmp_path, **header))).rows())[row]


@pytest.mark.parametrize(
    "change", [lambda t: t[0, 0], lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to(torch.complex64)]
)
def test_the_card_of_what_cannot_be_applied_says_so(
    good: Path, tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    path = changed(good, tmp_path, change, second=False)
    assert AdapterCard.of(read_adapter(path)).scale.startswith("cannot be applied: ")
