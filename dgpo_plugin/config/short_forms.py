"""The section ``rewards`` as people write it, and as they wrote it when it was called ``reward``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml


def spelled_out(rewards: Any) -> Any:
    """The short forms ``ocr``, ``[ocr, hpsv2]`` and ``{ocr: 2}`` as ``{ocr: {weight: 2}}``; anything else as it is."""
    if isinstance(rewards, str):
        rewards = [rewards]
    names = [name for name in rewards if isinstance(name, str)] if isinstance(rewards, list) else []
    if names and len(set(names)) == len(rewards):  # one that is named twice is no short form
        rewards = dict.fromkeys(names)
    if not isinstance(rewards, Mapping):
        return rewards
    return {label: _term(term) for label, term in rewards.items()}


def _term(term: Any) -> Any:
    if term is None:
        return {}
    return {"weight": term} if isinstance(term, int | float) and not isinstance(term, bool) else term


def weighted_labels(weights: Iterable[tuple[str, float]]) -> str:
    """Labels and weights for people: ``2 ocr + 0.5 hps``; a single label whose weight is 1 stands alone."""
    pairs = list(weights)
    plain = len(pairs) == 1 and pairs[0][1] == 1
    return " + ".join(label if plain else f"{weight:g} {label}" for label, weight in pairs)


def instead_of(reward: Any) -> str:
    """What to write instead of a section ``reward``, with the names in it, on one line."""
    section = dict(reward) if isinstance(reward, Mapping) else {"name": reward}
    name, weights, options = (section.pop(key, None) for key in ("name", "sum", "options"))
    if not isinstance(weights, Mapping) or not weights:
        weights = {name if isinstance(name, str) else "ocr": 1}
    own = options if isinstance(options, Mapping) else {}
    rewards = {
        label: {"weight": w, **({"options": own[label]} if own.get(label) else {})} for label, w in weights.items()
    }
    new = {"rewards": rewards, **({"scoring": section} if section else {})}
    text = yaml.safe_dump(new, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return " ".join(text.split())[1:-1]
