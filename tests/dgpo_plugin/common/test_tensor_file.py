"""A file of tensors is seen to be one, and whole, before anything reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.tensor_file import tensor_header
from tests.dgpo_plugin.broken_files import CUT, STAND_INS, cut

pytestmark = pytest.mark.fast


def whole_file(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({"a.weight": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.int64)}, file, metadata={"format": "pt"})
    return file


def test_a_whole_file_is_described(tmp_path: Path) -> None:
    header = tensor_header(whole_file(tmp_path))
    assert {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()} == {
        "a.weight": ("F32", [4, 3]),
        "b": ("I64", [2]),
    }


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert tensor_header(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("kind", STAND_INS)
def test_what_stands_in_for_it_is_named_with_the_cure(kind: str, tmp_path: Path) -> None:
    content, said = STAND_INS[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"model.safetensors .*{said}") as told:
        tensor_header(file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("where", CUT)
def test_a_cut_file_is_named(where: str, tmp_path: Path) -> None:
    file = whole_file(tmp_path)
    said = cut(file, where)
    with pytest.raises(UserError, match=f"model.safetensors .*{said}.*fetch it again"):
        tensor_header(file)


def test_what_is_behind_the_tensors_is_damage(tmp_path: Path) -> None:
    file = whole_file(tmp_path)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="has 4 bytes more than its header says"):
        tensor_header(file)


@pytest.mark.parametrize("header", [{"a": 1}, {"a": {"dtype": "F32"}}, {"a": {"data_offsets": []}}, [1], "a"])
def test_a_header_of_another_form_is_damage(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="fetch it again"):
        tensor_header(tmp_path / "x.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.safetensors cannot be read \(No such file or directory\)"):
        tensor_header(tmp_path / "x.safetensors")
