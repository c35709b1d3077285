"""A base is what is loaded of it, part by part: the same from other files, another one from other numbers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_plugin.common import content
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import base_identity, load_model
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.base_identity import (
    BaseIdentity,
    PartIdentity,
    base_as_text,
    base_from_text,
    compared_part,
    compared_parts,
    weights_identity,
)
from dgpo_plugin.models.load import world_pipeline

pytestmark = pytest.mark.fast

SHAPES = world_pipeline("shapes")
DENOISER, VAE = "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
CLIP, T5 = "text_encoder/model", "text_encoder_3/model"


@pytest.fixture(scope="module")
def original() -> BaseIdentity:
    return loaded("shapes").identity


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHAPES, tmp_path / "copy"))


def loaded(path: str) -> Model:
    return load_model(ModelConfig(path=path, max_sequence_length=1))


def verdicts(before: BaseIdentity, folder: Path) -> dict[str, str]:
    """Every part that is not the same, with its verdict."""
    found = compared_parts(before, loaded(str(folder)).identity)
    return {name: part.verdict for name, part in found.items() if part.verdict != "the same"}


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, {"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- the same base


def variant_beside(folder: Path) -> None:
    for stem in (DENOISER, VAE, CLIP):
        tensors = {name: t.half() * 2 for name, t in load_file(folder / f"{stem}.safetensors").items()}
        save_file(tensors, folder / f"{stem}.fp16.safetensors")
        save_file(tensors, folder / f"{stem}.non_ema.safetensors")


def pickle_beside(folder: Path) -> None:
    (folder / f"{VAE}.bin").write_bytes(b"no pickle is opened")
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"no pickle is opened")


def saved_again(folder: Path) -> None:
    model: Any = loaded(str(folder))
    model.pipeline.save_pretrained(folder)


def saved_again_in_shards(folder: Path) -> None:
    model: Any = loaded(str(folder))
    for stem in (DENOISER, VAE, CLIP):
        (folder / f"{stem}.safetensors").unlink()
    model.pipeline.save_pretrained(folder, max_shard_size="300KB")
    assert list(folder.glob("transformer/*-of-*.safetensors"))


def one_file_beside_shards(folder: Path) -> None:
    """diffusers loads the shards then; what is in the single file is not loaded."""
    whole = load_file(folder / f"{DENOISER}.safetensors")
    names = sorted(whole)
    half = {"a": names[:70], "b": names[70:]}
    for letter, some in half.items():
        save_file({name: whole[name] for name in some}, folder / f"transformer/{letter}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"{letter}.safetensors" for letter in half for name in half[letter]}}
    (folder / f"{DENOISER}.safetensors.index.json").write_text(json.dumps(index))
    rewrite(folder / f"{DENOISER}.safetensors", lambda tensors: {name: t + 1 for name, t in tensors.items()})


def shards_beside_one_file(folder: Path) -> None:
    """transformers loads the single file then."""
    save_file({"text_projection.weight": torch.zeros(1)}, folder / "text_encoder/a.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {"text_projection.weight": "a.safetensors"}}
    (folder / f"{CLIP}.safetensors.index.json").write_text(json.dumps(index))


def with_tables(folder: Path) -> None:
    """As older versions saved them."""
    name = "text_model.embeddings.position_ids"
    rewrite(folder / f"{CLIP}.safetensors", lambda tensors: {**tensors, name: torch.arange(12)[None]})


def other_metadata(folder: Path) -> None:
    save_file(load_file(folder / f"{VAE}.safetensors"), folder / f"{VAE}.safetensors", {"format": "pt", "who": "me"})


def tied_twice(folder: Path) -> None:
    key = "encoder.embed_tokens.weight"
    rewrite(folder / f"{T5}.safetensors", lambda tensors: {**tensors, key: tensors["shared.weight"].clone()})


def tied_under_the_other_name(folder: Path) -> None:
    rewrite(
        folder / f"{T5}.safetensors",
        lambda tensors: {name.replace("shared.", "encoder.embed_tokens."): t for name, t in tensors.items()},
    )


def on_the_hub(folder: Path) -> None:
    """The hub's cache: every file is a link to a blob."""
    for number, file in enumerate(sorted(folder.rglob("*.safetensors"))):
        blob = folder / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)


def default_settings_left_out(folder: Path) -> None:
    file = folder / "scheduler/scheduler_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: values[key] for key in ("_class_name", "shift")}))


def written_by_another_version(folder: Path) -> None:
    for part in ("vae", "transformer"):
        edit(folder / part / "config.json", _diffusers_version="0.1", _name_or_path="/home/jane")
    edit(folder / "text_encoder/config.json", transformers_version="4.1", torch_dtype="float16", architectures=["X"])


def stored_wider(folder: Path) -> None:
    """The same numbers in float32."""
    for stem in (DENOISER, VAE):
        rewrite(folder / f"{stem}.safetensors", lambda tensors: {name: t.float() for name, t in tensors.items()})


SAME = [
    variant_beside,
    pickle_beside,
    saved_again,
    saved_again_in_shards,
    one_file_beside_shards,
    shards_beside_one_file,
    with_tables,
    other_metadata,
    tied_twice,
    tied_under_the_other_name,
    on_the_hub,
    default_settings_left_out,
    written_by_another_version,
    stored_wider,
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_other_files_of_the_same_base(original: BaseIdentity, copy: Path, change: Callable[[Path], None]) -> None:
    change(copy)
    assert verdicts(original, copy) == {}


# ---- another one


def element(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = max(tensors, key=lambda each: tensors[each].numel())
    tensors[name].view(-1)[-1] += 0.01
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two tensors that have changed places."""
    first, second = "encoder.down_blocks.0.resnets.0.conv1.bias", "encoder.down_blocks.0.resnets.0.conv2.bias"
    return {**tensors, first: tensors[second], second: tensors[first]}


def trained_a_little(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    steps = {name: t.float().std(correction=0) * 0.03 * torch.randn(t.shape) for name, t in tensors.items()}
    return {name: t + steps[name].to(t.dtype) for name, t in tensors.items()}


DIFFERENT: list[tuple[str, Callable[[Path], None]]] = [
    ("vae", lambda folder: rewrite(folder / f"{VAE}.safetensors", element)),
    ("vae", lambda folder: rewrite(folder / f"{VAE}.safetensors", renamed)),
    ("vae", lambda folder: rewrite(folder / f"{VAE}.safetensors", trained_a_little)),
    ("vae", lambda folder: edit(folder / "vae/config.json", scaling_factor=0.5)),
    ("transformer", lambda folder: rewrite(folder / f"{DENOISER}.safetensors", element)),
    ("transformer", lambda folder: rewrite(folder / f"{DENOISER}.safetensors", trained_a_little)),
    ("text_encoder", lambda folder: rewrite(folder / f"{CLIP}.safetensors", element)),
    ("text_encoder", lambda folder: edit(folder / "text_encoder/config.json", layer_norm_eps=0.1)),
    ("text_encoder_3", lambda folder: rewrite(folder / f"{T5}.safetensors", element)),
    ("scheduler", lambda folder: edit(folder / "scheduler/scheduler_config.json", shift=1.0)),
    ("scheduler", lambda folder: edit(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=True)),
    ("tokenizer", lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=9)),
    ("tokenizer_2", lambda folder: swap_tokens(folder / "tokenizer_2/tokenizer.json")),
]


def swap_tokens(file: Path) -> None:
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) > 5][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(("part", "change"), DIFFERENT)
def test_another_part_is_named(original: BaseIdentity, copy: Path, part: str, change: Callable[[Path], None]) -> None:
    change(copy)
    assert verdicts(original, copy) == {part: "differs"}


def test_a_setting_that_differs_is_named_with_both_values(original: BaseIdentity, copy: Path) -> None:
    edit(copy / "scheduler/scheduler_config.json", shift=1.0)
    found = compared_parts(original, loaded(str(copy)).identity)["scheduler"]
    assert found.detail == "shift is 1.0 and was 3.0"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_cast_copy_is_the_same_but_rounded(original: BaseIdentity, copy: Path, kind: torch.dtype) -> None:
    stems = (CLIP, T5) if kind == torch.float16 else (DENOISER, VAE, CLIP, T5)  # two are stored in fp16
    for stem in stems:
        rewrite(copy / f"{stem}.safetensors", lambda tensors: {name: t.to(kind) for name, t in tensors.items()})
    assert verdicts(original, copy) == {stem.split("/")[0]: "the same but rounded" for stem in stems}


def test_a_part_that_only_one_has_is_named() -> None:
    part = PartIdentity(digest="1")
    assert compared_part(part, None).detail == "is missing"
    assert compared_part(None, part).detail == "is new"
    assert compared_part(part, None).verdict == compared_part(None, part).verdict == "differs"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_setting_that_json_has_no_number_for_is_the_same_when_it_is_read_again(
    original: BaseIdentity, copy: Path, value: float
) -> None:
    """As Sana's scheduler has one: a run of it could not be resumed."""
    edit(copy / "scheduler/scheduler_config.json", base_shift=value)
    now = loaded(str(copy)).identity
    then = {name: PartIdentity.model_validate_json(part.model_dump_json()) for name, part in now.items()}
    assert {part.verdict for part in compared_parts(then, now).values()} == {"the same"}
    for kept in (None, value):  # what older versions wrote, in checkpoints and in headers
        settings = {**now["scheduler"].settings, "base_shift": kept}
        old = {**now, "scheduler": now["scheduler"].model_copy(update={"settings": settings})}
        assert {part.verdict for part in compared_parts(old, now).values()} == {"the same"}
    found = compared_parts(original, now)["scheduler"]
    assert found.verdict == "differs"


# ---- in headers


def test_a_header_tells_as_much_as_is_needed(original: BaseIdentity, copy: Path) -> None:
    text = base_as_text(original, "transformer")
    assert len(text) < 16_000
    back = base_from_text(text)
    assert {name: part.verdict for name, part in compared_parts(back, original).items()} == dict.fromkeys(
        original, "the same"
    )
    rewrite(copy / f"{DENOISER}.safetensors", lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert verdicts(back, copy) == {"transformer": "the same but rounded"}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"vae": 3}', '{"vae": {"digest": 1}}', "[" * 100_000])
def test_a_header_that_is_none_tells_nothing(text: str) -> None:
    assert base_from_text(text) == {}


# ---- reading


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose tensors are read from here on."""
    files: list[str] = []
    really = base_identity._read  # noqa: SLF001

    def noted(given: list[Path], *others: Any) -> list[str]:
        files.extend(file.name for file in given)
        return really(given, *others)

    monkeypatch.setattr(base_identity, "_read", noted)
    return files


def test_files_are_read_once_and_again_when_they_changed(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4)}, file)
    first = weights_identity([file], "a")
    assert weights_identity([file], "a") == first
    assert reads == ["a.safetensors"]
    before = file.stat()
    save_file({"x": torch.ones(4) * 2}, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as large, and as old as it was
    assert weights_identity([file], "a") != first
    assert len(reads) == 2


def test_what_is_large_is_remembered_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(content, "WORTH_KEEPING", 10)
    monkeypatch.setattr(content, "cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4)}, file)
    first = weights_identity([file], "a")
    monkeypatch.setattr(content, "_KNOWN", {})
    assert weights_identity([file], "a") == first
    assert len(reads) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("damaged")
    monkeypatch.setattr(content, "_KNOWN", {})
    assert weights_identity([file], "a") == first
    assert len(reads) == 2


def test_a_long_reading_is_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({name: torch.ones(4) for name in "xyz"}, file)
    caplog.set_level(logging.INFO)
    weights_identity([file], "the base's vae")
    assert caplog.messages == []
    monkeypatch.setattr(content, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(content, "_KNOWN", {})
    weights_identity([file], "the base's vae")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("reading the base's vae, to know it again: 0.0 of 0.0 GB")


@pytest.mark.parametrize("blob", [b"", b"cut", b"\x10\0\0\0\0\0\0\0{"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, blob: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(blob)
    with pytest.raises(UserError, match="the base's vae: not whole safetensors files .* fetch the model again"):
        weights_identity([file], "the base's vae")


def test_no_weights_are_an_error(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="no safetensors weights under transformer/ or unet/"):
        loaded(str(tmp_path / "copy"))
