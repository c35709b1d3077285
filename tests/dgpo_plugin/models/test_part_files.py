"""What lies in the place of a part's files is named, with the cure, before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from dgpo_plugin.commands.main import main
from tests.dgpo_plugin.broken_bases import SOME, Bases, changed, copied, loaded, refusal, sharded, weights_of
from tests.dgpo_plugin.broken_files import CUT, POINTER, STAND_INS, cut


@pytest.mark.parametrize(("name", "part"), SOME)
@pytest.mark.parametrize("kind", ["LFS pointer", "web page", "JSON error", "empty", "zeros", "pickle"])
def test_a_stand_in_is_named_in_any_part(name: str, part: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    content, said = STAND_INS[kind]
    folder = copied(bases(name), tmp_path, part)
    file = weights_of(folder, part)
    file.write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"model {folder}: {part}: {file} ")
    assert re.search(said, message)


@pytest.mark.parametrize(("name", "part"), SOME)
@pytest.mark.parametrize("where", CUT[:2])
def test_a_cut_file_is_named_in_any_part(name: str, part: str, where: str, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases(name), tmp_path, part)
    file = weights_of(folder, part)
    cut(file, where)
    message = refusal(folder)
    assert message.startswith(f"model {folder}: {part}: {file} ")
    assert "fetch it again" in message


@pytest.mark.parametrize(("name", "part"), SOME)
def test_a_missing_shard_is_named(name: str, part: str, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases(name), tmp_path, part)
    sharded(folder, part, shards=3)
    gone = sorted((folder / part).glob("*-of-*"))[1]
    gone.unlink()
    assert f"{part}: {folder / part} lacks 1 of 3 shards ({gone.name})" in refusal(folder)


@pytest.mark.parametrize(("name", "part"), SOME[1:3])
@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a"', b"[]", b"", POINTER])
def test_a_bad_index_is_named(name: str, part: str, content: bytes, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases(name), tmp_path, part)
    sharded(folder, part)
    (index,) = (folder / part).glob("*.index.json")
    index.write_bytes(content)
    message = refusal(folder)
    assert f"{part}: {index} " in message


@pytest.mark.parametrize(("name", "part"), SOME[1:3])
@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "; fetch the model again, with its weights"),
        (["{stem}.fp16.safetensors"], "only {stem}.fp16.safetensors; rename it"),
        (["pytorch_model.bin"], "only pytorch_model.bin, and pickles are not read"),
        (["weights.ckpt"], "only weights.ckpt, and pickles are not read"),
    ],
)
def test_other_weights_are_named(
    name: str, part: str, others: list[str], said: str, bases: Bases, tmp_path: Path
) -> None:
    folder = copied(bases(name), tmp_path, part)
    file = weights_of(folder, part)
    for other in others:
        shutil.copy(file, file.with_name(other.format(stem=file.stem)))
    file.unlink()
    message = refusal(folder)
    assert f"{part}: {folder / part} has no {file.name}" in message
    assert said.format(stem=file.stem) in message


def test_a_link_that_leads_nowhere_is_named(bases: Bases, tmp_path: Path) -> None:
    """A snapshot whose blobs were cleaned away, or a folder that was copied without what its links lead to."""
    folder = copied(bases("sd15"), tmp_path, "vae")
    file = weights_of(folder, "vae")
    file.unlink()
    file.symlink_to("../blobs/gone")
    assert f"has no {file.name}: the link of that name leads to ../blobs/gone, which is not there" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd15", "unet/config.json"),
        ("sd15", "text_encoder/config.json"),
        ("sd15", "vae/config.json"),
        ("sd15", "tokenizer/tokenizer.json"),
        ("flux", "tokenizer_2/tokenizer_config.json"),
        ("sd15", "scheduler/scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("how", ["pointer", "web page", "empty", "cut"])
def test_texts_are_looked_at_too(name: str, file: str, how: str, bases: Bases, tmp_path: Path) -> None:
    part = file.partition("/")[0]
    folder = copied(bases(name), tmp_path, part)
    whole = (folder / file).read_bytes()
    content = {"pointer": POINTER, "web page": b"<html></html>", "empty": b"", "cut": whole[: len(whole) // 2]}[how]
    (folder / file).write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"model {folder}: {part}: {folder / file} ")
    said = {"pointer": "git lfs pull", "web page": "is a web page", "empty": "is empty", "cut": "fetch it again"}
    assert said[how] in message


def test_vocabularies_count_where_nothing_else_is_read(bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases("flux"), tmp_path, "tokenizer_2")
    (folder / "tokenizer_2" / "spiece.model").write_bytes(POINTER)

    loaded(folder)  # tokenizer.json says all
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    assert "tokenizer_2: " in (message := refusal(folder))
    assert "spiece.model is a Git LFS pointer" in message


# ---- a LoRA in the base


def with_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``save_pretrained`` writes a module that an adapter was added to."""
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if "to_q.weight" in key or "q_proj.weight" in key or ".q.weight" in key:
            module = key.removesuffix(".weight")
            saved |= {
                f"{module}.base_layer.weight": tensor,
                f"{module}.lora_A.default.weight": torch.zeros(2, tensor.shape[1]),
                f"{module}.lora_B.default.weight": torch.zeros(tensor.shape[0], 2),
            }
        else:
            saved[key] = tensor
    assert len(saved) > len(tensors)
    return saved


def processors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers kept them before peft."""
    return tensors | {"attn1.processor.to_q_lora.down.weight": torch.zeros(2, 4)}


def kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lora_unet_down_blocks_0_to_q.lora_down.weight": torch.zeros(2, 4)}


def dora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"a.lora_magnitude_vector.default.weight": torch.zeros(4)}


@pytest.mark.parametrize(("name", "part"), SOME)
@pytest.mark.parametrize("kind", [with_peft, processors, kohya, dora])
def test_a_base_saved_with_a_lora_is_named(name: str, part: str, kind: Any, bases: Bases, tmp_path: Path) -> None:
    message = refusal(changed(bases(name), tmp_path, part, kind))
    assert f"{part}: {tmp_path / part} was saved with a LoRA on it (" in message
    assert "fuse_lora" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize("how", ["model.save_pretrained", "its own state"])
def test_what_peft_itself_saves_is_named(how: str, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases("sd15"), tmp_path, "text_encoder")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    wrapped = get_peft_model(encoder, PeftConfig(r=2, target_modules=["q_proj"]))
    if how == "model.save_pretrained":
        wrapped.save_pretrained(folder / "text_encoder")  # beside the base's own file
        assert "has an adapter_config.json" in refusal(folder)
    else:
        save_file(wrapped.state_dict(), weights_of(folder, "text_encoder"), metadata={"format": "pt"})
        assert "was saved with a LoRA on it" in refusal(folder)


# ---- shapes and quantized weights


@pytest.mark.parametrize(
    ("name", "part", "key", "tensor"),
    [
        ("sd15", "unet", "conv_in.weight", torch.zeros(16, 9, 3, 3)),  # an inpainting model's
        ("sd15", "vae", "decoder.conv_out.weight", torch.zeros(4, 16, 3, 3)),
        ("sd15", "text_encoder", "embeddings.token_embedding.weight", torch.zeros(900, 32)),
        ("flux", "text_encoder_2", "shared.weight", torch.zeros(900, 32)),
        ("flux", "transformer", "x_embedder.weight", torch.zeros(64, 128)),
    ],
)
def test_another_shape_is_named(name: str, part: str, key: str, tensor: Tensor, bases: Bases, tmp_path: Path) -> None:
    message = refusal(changed(bases(name), tmp_path, part, lambda tensors: tensors | {key: tensor}))
    assert f"{part}: " in message
    assert "weights have other shapes than config.json says (first: " in message
    assert str(tuple(tensor.shape)) in message


@pytest.mark.parametrize(("name", "part"), SOME[1:3])
@pytest.mark.parametrize(
    ("beside", "dtype"),
    [
        ("{}_scale", torch.float8_e4m3fn),
        ("{module}.scale_weight", torch.float8_e4m3fn),
        ("{module}.SCB", torch.int8),
        ("{}.absmax", torch.float32),
        ("", torch.int8),
        ("", torch.uint8),
    ],
)
def test_quantized_weights_that_nothing_describes_are_refused(
    name: str, part: str, beside: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
        extra = beside.format(key, module=key.removesuffix(".weight"))
        return tensors | {key: tensors[key].to(dtype)} | ({extra: torch.ones(1)} if extra else {})

    message = refusal(changed(bases(name), tmp_path, part, quantized))
    assert f"{part}: its weights are quantized (" in message
    assert "model.quantization" in message


def test_float8_without_a_scale_is_a_precision(bases: Bases, tmp_path: Path) -> None:
    def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}

    folder = changed(bases("sd15"), tmp_path, "text_encoder", rounded)
    (encoder,) = loaded(folder).encoders
    stored = load_file(weights_of(folder, "text_encoder"))["final_layer_norm.weight"]
    assert torch.equal(encoder.state_dict()["final_layer_norm.weight"], stored.float())


# ---- the command


@pytest.mark.parametrize("broken", ["missing", "pointer", "index"])
def test_it_is_one_line_and_exit_code_2(broken: str, bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    folder = copied(bases("sd15"), tmp_path / "base", "text_encoder")
    file = weights_of(folder, "text_encoder")
    if broken == "missing":
        tensors = load_file(file)
        tensors.popitem()
        save_file(tensors, file, metadata={"format": "pt"})
    elif broken == "pointer":
        file.write_bytes(POINTER)
    else:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    told = CliRunner().invoke(main, ["sample", str(folder), "--prompt", "a cat", "--output", str(tmp_path / "cat.png")])
    assert told.exit_code == 2
    assert told.stderr.startswith(f"error: model {folder}: ")
    assert told.stderr.count("\n") == 1
    assert not (tmp_path / "cat.png").exists()
