"""At which scale a LoRA file means to be applied, told from its tensors and its header.

Our own files need none of this: their scale is in the weights. Older files of peft and diffusers keep alpha in the
header alone, or in a file beside them, which diffusers reads and ComfyUI does not: with alpha = 2 rank they run there
at half strength. A header is believed only where it describes the tensors; otherwise the scale is unknown, and that
is said.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgpo_plugin.adapters.kinds import Layer, by_kind, lora_layers
from dgpo_plugin.common.errors import UserError

DIFFUSERS_HEADER = "lora_adapter_metadata"
OWN_ALPHA = "dgpo.original_alpha"
ALPHA_WORDS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
"""What trainers call alpha in a header beside the tensors; kohya's first."""
ALPHA_IN_TEXT = re.compile(r"""["'](?:lora_|network_)?alpha["']\s*:\s*["']?(?P<alpha>[0-9.eE+-]+)""")
"""alpha inside settings that a header holds as JSON, under whichever name (``adapter_config``, ``lora_config``)."""
CAPTIONS = ("ss_tag", "ss_dataset", "ss_bucket")
"""How kohya's fields begin in which "alpha" is a word of somebody's captions."""
PEFT_DEFAULT = 8
"""peft's rank and alpha where settings name none (peft/tuners/lora/config.py, ``LoraConfig``)."""
ALTERED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""peft's ``init_lora_weights`` after which the base that the adapter is added to is not the published one."""
REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
"""In a stranger's regular expression: nested repeats can take exponential time, and no layer's name needs them."""
LONGEST_PATTERN = 300
MOST_PATTERNS = 5000
MOST_TRIES = 1_000_000
"""Of one pattern on one layer's name: some hundredths of a second."""


@dataclass(frozen=True, eq=False)
class ScaledTensors:
    """An adapter's tensors as loaders are to take them.

    Attributes:
        tensors: by key, with the scale in them where loaders would not apply it.
        note: a line for people on what the scale is and where it comes from.
        doubt: why the scale is unknown, and what the file seems to say; empty if it is known. The tensors are then as
            they are stored.
    """

    tensors: dict[str, Tensor]
    note: str
    doubt: str = ""


class _Undescribed(Exception):
    """A header that is about other tensors than those of its file; the message says how that can be seen."""


def fold_scale(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> ScaledTensors:
    """Multiply a header's alpha / rank into the (outputs, rank) matrices, in float32; leave other files as they are.

    Raises:
        UserError: a header that cannot be read.
    """
    layers, same = lora_layers(tensors, denoiser_only=True), dict(tensors)
    try:
        own = alpha_scales(tensors, layers)
        if own:
            _check_rest(layers, own, header)
            return ScaledTensors(same, f"{_span(own)}, alpha / rank as tensors, which loaders apply")
        if not layers:
            return ScaledTensors(same, f"as ComfyUI applies {', '.join(by_kind(tensors))} tensors")
        if OWN_ALPHA in header:
            _check_rank(header, layers)
            return ScaledTensors(same, f"1, alpha / rank is in the weights (alpha was {header[OWN_ALPHA]})")
        if DIFFUSERS_HEADER in header:
            return _from_diffusers(tensors, layers, header)
        return ScaledTensors(same, _without_alpha(header, layers))
    except _Undescribed as doubt:
        return ScaledTensors(same, f"unknown: {doubt}; applied as it is stored, as ComfyUI does", str(doubt))


def alpha_scales(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, float]:
    """alpha / rank of each LoRA layer that has an ``.alpha`` tensor."""
    stated = {name: layer for name, layer in layers.items() if f"{name}.alpha" in tensors}
    return {name: float(tensors[f"{name}.alpha"]) / layer.rank for name, layer in stated.items()}


def _check_rest(layers: Mapping[str, Layer], own: Mapping[str, float], header: Mapping[str, str]) -> None:
    """Doubt a file of which some layers have an ``.alpha`` tensor and others do not, or one that is 0."""
    rest = [name for name in layers if name not in own]
    if 0 in own.values():
        raise _Undescribed("an .alpha is 0, which ComfyUI takes for a strength of 0 and kohya for the rank")
    if not rest:
        return
    said = header.get("ss_network_alpha")
    raise _Undescribed(
        f"{len(own)} of {len(layers)} layers have an .alpha ({_span(own)}) and {len(rest)} have none (first: "
        f"{rest[0]}), which loaders take for 1" + (f", where the header's ss_network_alpha is {said}" if said else "")
    )


def _check_rank(header: Mapping[str, str], layers: Mapping[str, Layer]) -> None:
    """Doubt a header of ours whose rank is not the tensors'."""
    said = header.get("ss_network_dim")
    if said is not None and any(str(layer.rank) != said for layer in layers.values()):
        raise _Undescribed(f"its header is about rank {said}, and its tensors have {_ranks(layers)}")


def _without_alpha(header: Mapping[str, str], layers: Mapping[str, Layer]) -> str:
    """What is said of a file that has alpha nowhere but in a header, in words that no loader reads."""
    stated = [(key, header[key]) for key in ALPHA_WORDS if header.get(key, "None") != "None"]
    settings = {key: text for key, text in header.items() if not key.startswith(CAPTIONS)}
    stated += [
        (f"{key}'s alpha", said["alpha"]) for key, text in settings.items() if (said := ALPHA_IN_TEXT.search(text))
    ]
    if not stated:
        return "1, the file states no alpha"
    key, alpha = stated[0]
    rank = header.get("ss_network_dim", alpha)
    if {layer.rank for layer in layers.values()} == {_number(alpha)} == {_number(rank)}:
        return f"1, alpha is the rank in its header ({key})"
    raise _Undescribed(
        f"its header has {key} {alpha}, its tensors have no .alpha and {_ranks(layers)}: alpha / rank is either in the "
        f"weights already, or was lost and is the strength to give"
    )


def _from_diffusers(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Layer], header: Mapping[str, str]
) -> ScaledTensors:
    """The tensors with the scale of ``lora_adapter_metadata``, or of peft's settings, in them."""
    settings, scaled, scales = _settings(header), dict(tensors), {}
    try:
        for name, layer in layers.items():
            scales[name] = _header_scale(settings, name, layer.rank)
            if _setting(settings, name, "use_dora", False) and "DoRA" not in by_kind(tensors):
                raise UserError("was trained as DoRA, and its magnitudes are not in it; export it again")
        _check_patterns(settings, layers)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise UserError(f"{DIFFUSERS_HEADER} in its header has no usable alpha ({error})") from error
    for name, layer in layers.items():
        scaled[layer.up] = tensors[layer.up].float() * scales[name]
    return ScaledTensors(
        scaled,
        f"{_span(scales)}, alpha / rank from the header, or from peft's adapter_config.json beside the file, "
        f"multiplied in here (loaders that read neither miss it)",
    )


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings in a header of diffusers, by name."""
    try:
        settings = json.loads(header[DIFFUSERS_HEADER])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{DIFFUSERS_HEADER} in its header is not JSON; export it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{DIFFUSERS_HEADER} in its header is no JSON object; export it again")
    return settings


def _setting(settings: Mapping[str, Any], name: str, key: str, default: Any) -> Any:
    """A layer's setting: of its component (``transformer.r``), else of all."""
    value = settings.get(f"{name.partition('.')[0]}.{key}", settings.get(key))
    return default if value is None else value


def _header_scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """peft's rule: alpha of the layer's pattern, else of all, over the rank, or over its root with rslora.

    Raises:
        _Undescribed: the settings are not about this layer.
    """
    alpha = float(_by_pattern(settings, name, "alpha_pattern", "lora_alpha"))
    if alpha == 0:
        raise _Undescribed(f"its header has lora_alpha 0 for {name}, with which nothing of it would be applied")
    expected = int(_by_pattern(settings, name, "rank_pattern", "r"))
    component = name.partition(".")[0]
    begun = str(_setting(settings, name, "init_lora_weights", "")).lower()
    if begun.startswith(ALTERED_BASES):
        raise UserError(f"was trained from {begun}, on a base that is not the published one; make a plain LoRA of it")
    if not any(key == "r" or key == "lora_alpha" or key.startswith(f"{component}.") for key in settings):
        about = ", ".join(sorted({f"{key.partition('.')[0]}.*" for key in settings if "." in key}))
        raise _Undescribed(f"its header is about {about or 'no layer'}, and its tensors are {component}.*")
    if expected != rank:
        raise _Undescribed(f"its header is about rank {expected}, and {name} has {rank} (alpha would be {alpha:g})")
    targets = _setting(settings, name, "target_modules", None)
    if isinstance(targets, list) and not any(f".{name}".endswith(f".{target}") for target in targets):
        raise _Undescribed(f"its header is about {len(targets)} target_modules, and {name} is none of them")
    return alpha / (math.sqrt(rank) if _setting(settings, name, "use_rslora", False) else rank)


def _by_pattern(settings: Mapping[str, Any], name: str, patterns: str, otherwise: str) -> Any:
    """A layer's value of the first pattern that it matches, else of all layers."""
    inner = name.partition(".")[2]
    known = _setting(settings, name, patterns, {})
    if len(known) > MOST_PATTERNS:
        raise ValueError(f"{patterns} has {len(known):,} patterns")
    for pattern, value in known.items():
        if _matches(pattern, inner):
            return value
    return _setting(settings, name, otherwise, PEFT_DEFAULT)


def _check_patterns(settings: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    """Doubt settings with a pattern for a layer that the file does not have."""
    for key, patterns in settings.items():
        component, _, field = key.rpartition(".")
        if field not in ("alpha_pattern", "rank_pattern"):
            continue
        inner = [name.partition(".")[2] for name in layers if not component or name.startswith(f"{component}.")]
        for pattern in patterns or {}:
            if inner and not any(_matches(pattern, name) for name in inner):
                raise _Undescribed(f"its header's {key} is about {pattern[:80]!r}, which is no layer of its tensors")


def _matches(pattern: str, name: str) -> bool:
    """Whether a layer's name ends as one of peft's patterns says (peft/utils/other.py, ``get_pattern_key``)."""
    if REPEATED_GROUP.search(pattern):
        raise ValueError(f"pattern {pattern[:40]!r} repeats a group, which may take for ever to match")
    if len(pattern) > LONGEST_PATTERN or _tries(pattern, len(name)) > MOST_TRIES:
        raise ValueError(f"pattern {pattern[:40]!r} may take for ever to match")
    return _compiled(pattern).match(name) is not None


@functools.lru_cache(MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _tries(pattern: str, length: int) -> int:
    """How many ways a backtracking match may try on a text: where each repeat ends, and which alternatives."""
    repeats = 1 + sum(pattern.count(sign) for sign in "*+?{")
    alternatives = math.prod(1 + part.count("|") for part in re.split("[()]", pattern))
    return math.comb(max(length, 2 * repeats), repeats) * alternatives


def _number(text: str) -> float:
    """A header's number; NaN, which equals nothing, if it is none (``Dynamic``, say, after kohya's resizing)."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ranks(layers: Mapping[str, Layer]) -> str:
    ranks = sorted({layer.rank for layer in layers.values()})
    return f"rank {', '.join(map(str, ranks))}"


def _span(scales: Mapping[str, float]) -> str:
    """One number if all are equal, else the least and the largest."""
    rounded = {round(scale, 4) for scale in scales.values()}
    low, high = min(rounded, default=1.0), max(rounded, default=1.0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
