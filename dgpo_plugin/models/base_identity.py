"""What a base model is, part by part: the tensors that are loaded, whatever files hold them, and what its settings say.

A part is a folder of a diffusers pipeline: the denoiser, the VAE, text encoders, tokenizers, the scheduler. Files that
lie beside those that are loaded (a variant, another format) do not count, nor how many files the tensors are cut into.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dgpo_plugin.common.content import ReadingProgress, path_hash, remembered
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import read_text
from dgpo_plugin.models.fingerprint import (
    MOST_TENSORS,
    Mark,
    Verdict,
    compared,
    mark,
    packed,
    short,
    shortened,
    unpacked,
)

TENSORS_IN_HEADER = 64
"""Of each part's fingerprint but the denoiser's."""
METHOD = "weights 2"
"""Of hashing and marking; another one's answers are not those of this one."""
NOT_SETTINGS = re.compile(r"_.*|architectures|(torch_)?dtype|transformers_version|quantization_config")
"""Of a configuration: where it is from, and how it happens to be held in memory."""
NOT_FINITE = ("inf", "-inf", "nan")
"""Numbers that JSON has none for, as a scheduler's ``lambda_min_clipped`` is: settings have them in these words."""
NOT_LOADED = ("position_ids", "inv_freq")
"""Ends of the names of tables that published checkpoints carry and that are computed anew."""
OUTER_NAMES = re.compile(r"^((text_model|language_model|model)\.)+")
"""What transformers puts before a text encoder's names or leaves out, by version (its ``conversion_mapping``)."""
OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
"""Names that diffusers changes when it loads old VAEs (``_convert_deprecated_attention_blocks``)."""
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "lm_head.weight")
"""Ends of the names that one tensor may be saved under, once or several times (tied weights)."""
PROBES = ("", 'A photo of two cats, "HELLO World" - 3.14!', "Straße naïve 雨の街 🚲", "red\tcube on  a blue ball")
"""Texts whose tokens tell tokenizers apart that have the same vocabulary."""
THREADS = min(4, os.cpu_count() or 1)


class PartIdentity(BaseModel):
    """What one part of a base is.

    Attributes:
        digest: SHA-256 over its tensors' names, shapes, types and bytes, or over a tokenizer's vocabulary; empty for a
            part without either.
        fingerprint: of its weights (:mod:`dgpo_plugin.models.fingerprint`); empty for none.
        settings: that its configuration holds, defaults included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = ""
    fingerprint: str = ""
    settings: dict[str, Any] = {}


BaseIdentity = Mapping[str, PartIdentity]
"""The parts by their folders' names."""


@dataclass(frozen=True)
class PartComparison:
    """How one part of a base compares with what it was.

    Attributes:
        detail: in what it differs, for people; empty if nothing more can be said.
        settings: the keys of those that differ.
    """

    verdict: Verdict
    detail: str = ""
    settings: tuple[str, ...] = ()


def identity_of_parts(folder: Path, components: Mapping[str, Any]) -> dict[str, PartIdentity]:
    """What a loaded pipeline's base is.

    Args:
        folder: that it was loaded from.
        components: by the names of their folders; None for one that was left out.

    Raises:
        UserError: a weight file cannot be read.
    """
    return {name: _part(folder / name, part) for name, part in sorted(components.items()) if part is not None}


def compared_parts(then: BaseIdentity, now: BaseIdentity) -> dict[str, PartComparison]:
    """Every part's verdict, also of one that only one of them has."""
    return {name: compared_part(then.get(name), now.get(name)) for name in sorted({*then, *now})}


def compared_part(then: PartIdentity | None, now: PartIdentity | None) -> PartComparison:
    """One part's verdict."""
    if then is None or now is None:
        return PartComparison("differs", "is new" if then is None else "is missing")
    # A setting that only one of them knows is another version's: its default was in force before.
    changed = [
        key for key in then.settings if key in now.settings and not _equal(then.settings[key], now.settings[key])
    ]
    if changed:
        shown = [f"{key} is {now.settings[key]!r} and was {then.settings[key]!r}" for key in changed[:3]]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return PartComparison("differs", ", ".join(shown) + more, tuple(changed))
    if then.digest == now.digest:
        return PartComparison("the same")
    before, after = unpacked(then.fingerprint), unpacked(now.fingerprint)
    if not before or not after:
        return PartComparison("differs")
    verdict = compared(before, after)
    if verdict == "the same" and _types_stored(before) == _types_stored(after):
        return PartComparison("differs")  # in a place that the fingerprint does not look at
    return PartComparison(verdict)


def _equal(then: Any, now: Any) -> bool:
    """Whether a setting is the same; older versions kept what is not finite as null, and in headers as a number."""
    return bool(then == now) or (now in NOT_FINITE and (then is None or str(then) == now))


def base_as_text(base: BaseIdentity, denoiser: str) -> str:
    """A base for an adapter's header: JSON, a few kilobytes, with the whole fingerprint of the denoiser alone.

    Args:
        denoiser: the part's name.
    """
    parts = {}
    for name, part in base.items():
        most = MOST_TENSORS if name == denoiser else TENSORS_IN_HEADER
        parts[name] = part.model_copy(update={"fingerprint": shortened(part.fingerprint, most)})
    return json.dumps({name: part.model_dump() for name, part in parts.items()}, separators=(",", ":"))


def base_from_text(text: str) -> dict[str, PartIdentity]:
    """The base that an adapter's header tells of; no parts if it tells of none that can be read."""
    try:
        return {name: PartIdentity.model_validate(part) for name, part in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):  # pydantic's is a ValueError
        return {}


def _types_stored(marks: Mapping[bytes, Mark]) -> dict[bytes, int]:
    return {name: each.stored for name, each in marks.items()}


def _part(folder: Path, part: Any) -> PartIdentity:
    from transformers import PreTrainedTokenizerBase  # seconds, which whoever only reads an identity is spared

    if isinstance(part, PreTrainedTokenizerBase):
        return _tokenizer(part)
    config = getattr(part, "config", {})  # diffusers' and transformers' classes
    values = config if isinstance(config, Mapping) else config.to_dict()
    plain = _flat(json.loads(json.dumps(values, default=str), parse_constant=lambda name: str(float(name))))
    if not isinstance(part, nn.Module):
        return PartIdentity(settings={"class": type(part).__name__, **plain})
    files = weight_files(folder, part)
    if not files:
        return PartIdentity(settings=plain)
    if not all(file.suffix == ".safetensors" for file in files):
        hashes = [path_hash(file) for file in files]
        return PartIdentity(digest=hashlib.sha256("".join(hashes).encode()).hexdigest(), settings=plain)
    digest, fingerprint = weights_identity(files, f"the base's {folder.name}")
    return PartIdentity(digest=digest, fingerprint=fingerprint, settings=plain)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration, those of sections with a dot."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if not NOT_SETTINGS.fullmatch(key):
            flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _tokenizer(tokenizer: Any) -> PartIdentity:
    """By what it makes of texts: a copy that was saved again has other files."""
    tokens = [tokenizer(text, verbose=False)["input_ids"] for text in PROBES]
    known = json.dumps([sorted(tokenizer.get_vocab().items()), tokens])
    template = hashlib.sha256(repr(tokenizer.chat_template or "").encode()).hexdigest()[:12]
    settings = {"model_max_length": min(tokenizer.model_max_length, 1 << 30), "chat_template": template}
    return PartIdentity(digest=hashlib.sha256(known.encode()).hexdigest(), settings=settings)


def weight_files(folder: Path, module: nn.Module) -> list[Path]:
    """The files that a module's weights are loaded from: what diffusers and transformers look for, in their order.

    diffusers (``ModelMixin.from_pretrained``) takes an index of shards before a single file, transformers
    (``_get_resolved_checkpoint_files``) the other way round; both take safetensors first.
    """
    from diffusers import ModelMixin

    ours = isinstance(module, ModelMixin)
    stem, other = ("diffusion_pytorch_model",) * 2 if ours else ("model", "pytorch_model")
    for name in (f"{stem}.safetensors", f"{other}.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        for file in (index, single) if ours else (single, index):
            if file.is_file():
                return [file] if file == single else _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(read_text(index))["weight_map"].values()
        return sorted({index.with_name(str(name)) for name in names})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weight files; fetch the model again") from error


def weights_identity(files: list[Path], what: str) -> tuple[str, str]:
    """The digest and the fingerprint of the tensors in safetensors files, read one by one.

    Args:
        what: they are, for the line about a long reading.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        progress = ReadingProgress(f"reading {what}", sum(file.stat().st_size for file in files))
        digest, fingerprint = remembered(METHOD, files, lambda: _read(files, progress))
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: {error.strerror}; fetch the model again") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{what}: not whole safetensors files ({error}); fetch the model again") from error
    return digest, fingerprint


@dataclass(frozen=True)
class _Stored:
    """A tensor as it is on the disk: type, shape and the hash of its bytes, and its mark."""

    name: str
    content: tuple[str, tuple[int, ...], str]
    mark: Mark | None


def _read(files: list[Path], progress: ReadingProgress) -> list[str]:
    found: list[_Stored] = []
    for file in files:
        with safetensors.safe_open(file, framework="pt") as handle:

            def stored(name: str, handle: Any = handle) -> _Stored:
                tensor = handle.get_tensor(name)
                # As bytes, because numpy has no bfloat16 and no eight-bit floats.
                blob = tensor.contiguous().flatten().view(torch.uint8).numpy()
                digest = hashlib.sha256(blob).hexdigest()
                progress.advance(blob.nbytes)
                return _Stored(name, (str(tensor.dtype), tuple(tensor.shape), digest), mark(name, tensor))

            with ThreadPoolExecutor(THREADS) as pool:
                found += pool.map(stored, handle.keys())
    named = _canonical(found)
    lines = sorted(json.dumps([name, *each.content]) for name, each in named.items())
    marks = [replace(each.mark, name=short(name)) for name, each in named.items() if each.mark is not None]
    return [hashlib.sha256("\n".join(lines).encode()).hexdigest(), packed(marks)]


def _canonical(found: list[_Stored]) -> dict[str, _Stored]:
    """Tensors by the names that they have whatever version saved them; of tied ones, one."""
    named = {each.name: each for each in found if not each.name.endswith(NOT_LOADED)}
    for rename in (lambda name: OUTER_NAMES.sub("", name), _new_attention):
        renamed = {rename(name): each for name, each in named.items()}
        named = renamed if len(renamed) == len(named) else named
    embeddings = sorted((name for name in named if name.endswith(EMBEDDINGS)), key=lambda n: ("lm_head" in n, n))
    distinct = {named[name].content: named.pop(name) for name in reversed(embeddings)}
    return named | {f"embedding {n}": each for n, each in enumerate(reversed(distinct.values()))}


def _new_attention(name: str) -> str:
    for old, new in OLD_ATTENTION:
        name = re.sub(rf"(attentions\.\d+)\.{old}\.(weight|bias)$", rf"\1.{new}.\2", name)
    return name
