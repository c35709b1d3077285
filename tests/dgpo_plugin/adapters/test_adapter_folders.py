"""What people name as an adapter: folders, other files, downloads that went wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast

LORA = {"transformer.a.lora_A.weight": torch.ones(2, 4), "transformer.a.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter.safetensors", "mine.safetensors"]
)
def test_a_folder_is_its_adapter(tmp_path: Path, name: str) -> None:
    save_file(LORA, tmp_path / name)
    if name != "mine.safetensors":  # beside the name that its writer gives it, others are not meant
        save_file({"optimizer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert read_adapter(tmp_path).path == tmp_path / name


def test_a_folder_of_pefts_has_its_alpha_with_it(tmp_path: Path) -> None:
    tensors = {key.replace("transformer.", "base_model.model."): tensor for key, tensor in LORA.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert read_adapter(tmp_path).usable.note.startswith("3, alpha / rank from the header")


def test_a_renamed_file_of_pefts_has_its_alpha_beside_it_where_it_is_the_only_one(tmp_path: Path) -> None:
    tensors = {key.replace("transformer.", "base_model.model."): tensor for key, tensor in LORA.items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert read_adapter(tmp_path).usable.note.startswith("3, alpha / rank from the header")
    save_file(LORA, tmp_path / "other.safetensors")
    assert read_adapter(tmp_path / "mine.safetensors").usable.note == "1, the file states no alpha"


@pytest.mark.parametrize("settings", ["", "{oops", "[1]", '"r"'])
def test_pefts_settings_that_are_broken_are_named_as_that_file(tmp_path: Path, settings: str) -> None:
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read; the adapter's alpha is in it"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("names", [("one", "two"), ("pytorch_lora_weights", "adapter_model"), ("a", "b", "c")])
def test_a_folder_of_several_asks_which(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save_file(LORA, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"is a folder with {len(names)} adapters \\(.*; name one of them"):
        read_adapter(tmp_path)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder without a .safetensors file; name the adapter's file"):
        read_adapter(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(
        UserError, match=r"pytorch_lora_weights.bin is a pickle, which can run code and is never loaded"
    ):
        read_adapter(tmp_path)


@pytest.mark.parametrize("command", ["inspect", "sample"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'{"error": "gated"}', "JSON, such as a server's error"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive"),
        (pickle.dumps({"a": 1}), "a pickle, which can run code and is never loaded"),
        (b"", "empty"),
    ],
)
def test_a_download_that_went_wrong_is_named(tmp_path: Path, command: str, content: bytes, told: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    arguments = {
        "inspect": ["inspect", str(path)],
        "sample": ["sample", "shapes", "--prompt", "x", "--output", str(tmp_path / "x.png"), "--adapter", str(path)],
    }
    done = CliRunner().invoke(main, arguments[command])
    assert done.exit_code == 2
    assert f"error: adapter {path}: not a whole safetensors file: {told}" in done.output


class Opened:
    """What a pickle that is loaded would leave behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(pickle.dumps(Opened()))
    with pytest.raises(UserError, match="a pickle"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model.diffusion_model.out.weight": torch.ones(2)}, "its 1 tensors are 1 whole-weight"),
        ({"emb_params": torch.ones(2, 8)}, "its 1 tensors are 1 text-encoder"),
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(2)}, "1 ControlNet or IP-Adapter"),
        ({"strange": torch.ones(2)}, "1 of no known kind"),
        ({}, "its header names none"),
    ],
)
def test_a_file_that_is_no_adapter_says_what_it_is(tmp_path: Path, tensors: dict[str, Tensor], told: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"holds no adapter: .*{told}"):
        read_adapter(tmp_path / "x.safetensors")


def test_a_lokr_has_a_card(tmp_path: Path) -> None:
    """It is no LoRA, but ComfyUI applies it."""
    path = tmp_path / "lokr.safetensors"
    save_file({"lycoris_a.lokr_w1": torch.ones(2, 2), "lycoris_a.lokr_w2": torch.ones(2, 2)}, path)
    card = AdapterCard.of(read_adapter(path))
    assert card.scale == "as ComfyUI applies LoKr tensors"
    assert card.tensors == "2 (2 LoKr), 8 parameters"
    assert load_file(path)


def test_the_card_counts_what_is_no_lora(tmp_path: Path) -> None:
    text = {key.replace("transformer", "text_encoder"): tensor.clone() for key, tensor in LORA.items()}
    save_file({**LORA, **text, "transformer.a.diff_b": torch.ones(4)}, tmp_path / "x.safetensors")
    assert AdapterCard.of(read_adapter(tmp_path / "x.safetensors")).tensors.startswith(
        "5 (2 text-encoder, 1 bias difference), "
    )
