"""Strict means strict: an adapter that no picture can be made with is one line, and not a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.tables import as_table
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.load import load_model
from dgpo_plugin.models.policy import Policy

pytestmark = pytest.mark.fast
CONFIG = load_config("shapes", ["lora.rank=2", "lora.alpha=4", "model.precision=fp32"])


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(CONFIG.model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = Policy(load_model(CONFIG.model), CONFIG.lora, seed=0)
    path = tmp_path_factory.mktemp("good") / "adapter.safetensors"
    weights = [torch.randn_like(p) for p in policy.parameters]
    export_adapter(policy, weights, path, TrainingFacts(CONFIG, 1))
    return path


def changed(good: Path, folder: Path, change: Callable[[Tensor], Tensor], *, second: bool = True) -> Path:
    """A copy with one of its tensors changed, and no hash to find it out by."""
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    name = sorted(n for n in tensors if n.endswith(".lora_B.weight" if second else ".lora_A.weight"))[0]
    tensors[name] = change(tensors[name]).contiguous()
    path = folder / "changed.safetensors"
    save_file(tensors, path, {key: value for key, value in header.items() if key != "modelspec.hash_sha256"})
    return path


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
    save_file(
        tensors, path, {"modelspec.hash_sha256": "0" * 64, "dgpo.base_weights_hash": header["dgpo.base_weights_hash"]}
    )
    apply_adapter(load_model(CONFIG.model), path)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity"])
def test_a_headers_alpha_that_is_no_number(model: Model, good: Path, tmp_path: Path, alpha: str) -> None:
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    path = tmp_path / "alpha.safetensors"
    metadata = json.dumps({"r": 2, "lora_alpha": 1}).replace(": 1}", f": {alpha}}}")
    save_file(
        tensors, path, {"lora_adapter_metadata": metadata, "dgpo.base_weights_hash": header["dgpo.base_weights_hash"]}
    )
    with pytest.raises(UserError, match="not finite"):
        apply_adapter(model, path)


def test_an_alpha_that_is_several_numbers(model: Model, good: Path, tmp_path: Path) -> None:
    tensors = read_adapter(good).tensors
    name = next(n for n in tensors if n.endswith(".lora_A.weight")).replace(".lora_A.weight", ".alpha")
    path = tmp_path / "alphas.safetensors"
    save_file({**tensors, name: torch.ones(3)}, path)
    with pytest.raises(UserError, match="must be one number"):
        apply_adapter(model, path)


def test_the_card_of_a_half_precision_file_with_a_hash(good: Path, tmp_path: Path) -> None:
    """numpy has no bfloat16: the card once died of it."""
    file = read_adapter(good)
    tensors, header = dict(file.tensors), file.header
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, header)
    assert "DOES NOT MATCH" in AdapterCard.of(read_adapter(path)).content_hash


def headed(good: Path, folder: Path, **header: str) -> Path:
    """A copy of the tensors under another header."""
    file = read_adapter(good)
    tensors, own = dict(file.tensors), file.header
    path = folder / "headed.safetensors"
    save_file(tensors, path, {"dgpo.base_weights_hash": own["dgpo.base_weights_hash"], **header})
    return path


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
