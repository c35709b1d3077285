"""Weights arrive, all of them, or the part and the weights are named: every part of every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.dgpo_plugin.broken_bases import (
    EVERY,
    PARTS,
    SOME,
    Bases,
    changed,
    copied,
    loaded,
    refusal,
    sharded,
    weights_of,
    without,
)

# ---- a weight that is missing


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_a_missing_weight_of_any_part_is_named(name: str, part: str, bases: Bases, tmp_path: Path) -> None:
    names = sorted(key for key in load_file(weights_of(bases(name), part)) if not key.endswith("num_batches_tracked"))
    gone = names[len(names) // 2]
    message = refusal(changed(bases(name), tmp_path, part, without(gone)))
    assert message.startswith(f"model {tmp_path}: {part}: 1 of the ")
    # transformers may know it by the name that it has in another class.
    assert gone.rpartition("layers.")[2] in message
    assert "fetch that folder again" in message


@pytest.mark.parametrize(
    ("name", "part", "gone"),
    [
        ("sdxl", "text_encoder_2", "text_projection.weight"),
        ("shapes", "text_encoder", "text_projection.weight"),
        ("shapes", "text_encoder_3", "shared.weight"),
        ("sd15", "text_encoder", "embeddings.position_embedding.weight"),
        ("flux2-dev", "vae", "bn.running_mean"),  # a buffer, but learned
        ("flux2-klein", "vae", "bn.running_var"),
        ("flux2-klein", "text_encoder", "model.norm.weight"),
        ("sd15", "unet", "conv_in.bias"),
        ("sd15", "vae", "post_quant_conv.weight"),
        ("z-image", "transformer", "x_pad_token"),
        ("shapes", "transformer", "proj_out.bias"),
    ],
)
def test_whatever_it_is(name: str, part: str, gone: str, bases: Bases, tmp_path: Path) -> None:
    message = refusal(changed(bases(name), tmp_path, part, without(gone)))
    assert f"{part}: 1 of the" in message
    assert gone.rpartition(".")[0] in message


@pytest.mark.parametrize(("name", "part"), SOME)
def test_keys_of_another_naming_are_all_missing(name: str, part: str, bases: Bases, tmp_path: Path) -> None:
    folder = changed(
        bases(name), tmp_path, part, lambda tensors: {f"conditioner.{key}": each for key, each in tensors.items()}
    )
    message = refusal(folder)
    assert f"model {folder}: {part}: " in message
    assert "more; it has conditioner." in message
    assert "random" in message


def test_a_few_are_named_and_the_others_counted(bases: Bases, tmp_path: Path) -> None:
    names = sorted(load_file(weights_of(bases("sd15"), "unet")))[:5]
    message = refusal(changed(bases("sd15"), tmp_path, "unet", without(*names)))
    assert "unet: 5 of the " in message
    assert f"{names[0]}, {names[1]}, {names[2]} and 2 more" in message


# ---- what is not missing


def same_weights(one: Any, other: Any) -> bool:
    parts = [(one.denoiser, other.denoiser), (one.vae, other.vae), *zip(one.encoders, other.encoders, strict=True)]
    states = [(first.state_dict(), second.state_dict()) for first, second in parts]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in states)


@pytest.mark.parametrize("name", PARTS)
def test_a_whole_base_is_loaded_without_a_word(
    name: str, bases: Bases, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded(bases(name))
    assert caplog.messages == []
    assert "MISSING" not in "".join(capfd.readouterr())


def renamed_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's attention as it was saved before diffusers 0.12."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for key, tensor in tensors.items():
        for new, name in old.items():
            key = key.replace(new, name)
        renamed[key] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stable Diffusion 1's text encoder: another prefix, and a buffer."""
    prefixed = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    return prefixed | {"text_model.embeddings.position_ids": torch.arange(12)[None]}


def embedded_otherwise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder.embed_tokens.weight" if key == "shared.weight" else key: each for key, each in tensors.items()}


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("flux", "text_encoder_2", embedded_otherwise),
        ("flux", "text_encoder_2", lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"].clone()}),
        ("sd15", "vae", renamed_attention),
        ("sdxl", "vae", renamed_attention),
        ("flux2-klein", "vae", without("bn.num_batches_tracked")),
        ("sd15", "text_encoder", as_published),
        ("sdxl", "text_encoder", lambda t: t | {"embeddings.position_ids": torch.arange(12)[None]}),
    ],
)
def test_what_is_tied_computed_or_renamed_is_not_missing(
    name: str, part: str, change: Any, bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert same_weights(loaded(changed(bases(name), tmp_path, part, change)), loaded(bases(name)))
    assert caplog.messages == []


def test_a_tied_head_need_not_be_there_and_an_untied_one_must(bases: Bases, tmp_path: Path) -> None:
    """FLUX.2 klein's text encoder is a language model with its head, which is its embedding in the 4B one."""
    folder = changed(bases("flux2-klein"), tmp_path, "text_encoder", without("lm_head.weight"))
    assert "lm_head.weight" in refusal(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    encoder = loaded(folder).encoders[0]
    assert encoder.lm_head.weight is encoder.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "part"), SOME)
def test_tensors_that_nobody_reads_are_one_line(
    name: str, part: str, bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"old.{number}.bias": torch.ones(2) for number in range(5)}
    folder = changed(bases(name), tmp_path, part, lambda tensors: tensors | extra)
    assert same_weights(loaded(folder), loaded(bases(name)))
    (line,) = caplog.messages
    assert line.startswith(f"model {folder}: {part} old.0.bias, ")
    assert line.endswith(" and 2 more not read, for want of a place")


def test_a_table_that_is_computed_is_told(bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(bases("shapes"), tmp_path, "transformer", without("pos_embed.pos_embed"))
    ours, theirs = (loaded(each).denoiser.pos_embed.pos_embed for each in (folder, bases("shapes")))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)  # which is stored in fp16
    assert caplog.messages == [f"model {folder}: transformer pos_embed.pos_embed made from config.json"]


@pytest.mark.parametrize(("name", "part"), SOME)
def test_shards_are_one_file(
    name: str, part: str, bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(bases(name), tmp_path, part)
    sharded(folder, part)
    assert same_weights(loaded(folder), loaded(bases(name)))
    assert caplog.messages == []


@pytest.mark.parametrize(("name", "part"), SOME)
def test_an_index_that_promises_too_much_is_not_believed(name: str, part: str, bases: Bases, tmp_path: Path) -> None:
    """The index names a tensor that its shard lacks: diffusers leaves it on the meta device."""
    folder = copied(bases(name), tmp_path, part)
    sharded(folder, part)
    shard = min((folder / part).glob("*.safetensors"))
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    save_file(without(gone)(tensors), shard, metadata={"format": "pt"})
    message = refusal(folder)
    assert f"{part}: 1 of the " in message
    assert gone.rpartition("layers.")[2] in message


@pytest.mark.parametrize("quantization", ["torchao-int8"])
def test_a_quantized_denoiser_is_whole_too(quantization: str, bases: Bases, tmp_path: Path) -> None:
    gone = sorted(name for name in load_file(weights_of(bases("flux"), "transformer")) if "to_q.weight" in name)[0]
    message = refusal(changed(bases("flux"), tmp_path, "transformer", without(gone)), quantization=quantization)
    assert "transformer: 1 of the" in message
    assert gone in message


# ---- the T5 that is left out on purpose


@pytest.mark.parametrize("how", ["folder", "index", "null", "all"])
def test_a_third_encoder_may_be_left_out(
    how: str, bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokens are then zeros, which is what the embedded world's third encoder says to everything."""
    folder = copied(bases("shapes"), tmp_path, "text_encoder_3")
    index = json.loads((folder / "model_index.json").read_text())
    if how in ("folder", "all"):
        shutil.rmtree(folder / "text_encoder_3")
        (folder / "tokenizer_3").unlink()
    if how == "null":
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    if how in ("index", "all"):
        del index["text_encoder_3"], index["tokenizer_3"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model, whole = loaded(folder), loaded(bases("shapes"))
    (line,) = caplog.messages
    assert line == f"model {folder}: goes without text_encoder_3 and tokenizer_3, which it does not have"
    ours, theirs = (each.encode(["a red circle", ""]).tensors for each in (model, whole))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)


@pytest.mark.parametrize(("name", "part"), [("flux", "text_encoder_2"), ("shapes", "text_encoder"), ("sdxl", "vae")])
def test_no_other_part_may(name: str, part: str, bases: Bases, tmp_path: Path) -> None:
    folder = copied(bases(name), tmp_path, part)
    shutil.rmtree(folder / part)
    assert refusal(folder).startswith(f"model {folder}: {part}: ")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    assert f"{part}: model_index.json leaves it out" in refusal(folder)
