"""Strict means strict: an adapter that no picture can be made with is one line, and not a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, AdapterFile, apply_adapter, read_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.load import load_model
from tests.dgpo_plugin.adapters.adapter_files import CONFIG, changed

pytestmark = pytest.mark.fast


def test_the_good_one_is_applied(model: Model, good: Path) -> None:
    assert apply_adapter(load_model(CONFIG.model), good).header["dgpo.algorithm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "holds NaN or infinite numbers"),
        (lambda t: t.index_fill(0, torch.tensor([0]), float("-inf")), "holds NaN or infinite numbers"),
        (lambda t: t.to(torch.int8), "holds int8; convert"),
        (lambda t: t > 0, "holds bool; convert"),
        (lambda t: t.to(torch.complex64), "holds complex64; convert"),
        (lambda t: t.to(torch.float8_e4m3fn), "holds float8_e4m3fn; convert"),
        (lambda t: t[:, :0], "a rank of at least 1"),
        (lambda t: t[0, 0], "a rank of at least 1"),
        (lambda t: t[0], "a rank of at least 1"),
        (lambda t: t[:, :1], "match no weight"),
    ],
)
def test_a_tensor_that_cannot_be_used(
    model: Model, good: Path, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        apply_adapter(model, changed(good, tmp_path, change))
    assert str(caught.value).startswith(f"adapter {tmp_path / 'changed.safetensors'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_fine(good: Path, tmp_path: Path, kind: torch.dtype) -> None:
    apply_adapter(load_model(CONFIG.model), changed(good, tmp_path, lambda t: t.to(kind)))


def test_bits_that_are_not_those_of_the_hash(model: Model, good: Path, tmp_path: Path) -> None:
    blob = bytearray(good.read_bytes())
    blob[-2] ^= 1  # still a number like any other
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(blob)
    with pytest.raises(UserError, match="not those that its header's hash is of"):
        apply_adapter(model, path)
    assert "DOES NOT MATCH" in AdapterCard.of(read_adapter(path)).content_hash


def test_a_strangers_hash_of_other_bytes_is_no_reason_to_refuse(good: Path, tmp_path: Path) -> None:
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path, {"modelspec.hash_sha256": "0" * 64, "dgpo.base_parts": header["dgpo.base_parts"]})
    apply_adapter(load_model(CONFIG.model), path)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity"])
def test_a_headers_alpha_that_is_no_number(model: Model, good: Path, tmp_path: Path, alpha: str) -> None:
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    path = tmp_path / "alpha.safetensors"
    metadata = json.dumps({"r": 2, "lora_alpha": 1}).replace(": 1}", f": {alpha}}}")
    save_file(tensors, path, {"lora_adapter_metadata": metadata, "dgpo.base_parts": header["dgpo.base_parts"]})
    with pytest.raises(UserError, match="not finite"):
        apply_adapter(model, path)


def test_an_alpha_that_is_several_numbers(model: Model, good: Path, tmp_path: Path) -> None:
    tensors = read_adapter(good).tensors
    name = next(n for n in tensors if n.endswith(".lora_A.weight")).replace(".lora_A.weight", ".alpha")
    path = tmp_path / "alphas.safetensors"
    save_file({**tensors, name: torch.ones(3)}, path)
    with pytest.raises(UserError, match="must be one number"):
        apply_adapter(model, path)


@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_a_command_opens_the_file_once(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    opened, safe_open = [], safetensors.safe_open

    def counting(path: Any, **options: Any) -> Any:
        opened.extend([path] if Path(path) == good else [])
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    arguments = {
        "inspect": [str(good)],
        "sample": ["shapes", "--prompt", "a red circle", "--steps", "1", "--output", str(tmp_path / "x.png")]
        + ["--adapter", str(good)],
    }
    done = CliRunner().invoke(main, [command, *arguments[command]])
    assert done.exit_code == 0, done.output
    assert opened == [good]


def test_a_file_says_its_own_fact_and_whoever_reads_it_its_name(tmp_path: Path) -> None:
    """ComfyUI calls a file by another name than its path."""
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="^not a whole safetensors file"):
        AdapterFile.read(path)
    with pytest.raises(UserError) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(f"adapter {path}: not a whole safetensors file")


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(model: Model, good: Path, strength: float) -> None:
    with pytest.raises(UserError, match="strength (nan|inf) draws no picture"):
        apply_adapter(model, good, strength=strength)
