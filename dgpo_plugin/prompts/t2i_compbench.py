"""The prompts that T2I-CompBench makes its pictures of: 300 of each of six kinds (arXiv 2307.06350).

They lie beside this file, byte for byte as in Karine-Huang/T2I-CompBench, examples/dataset: color at commit 3310c2f1,
non_spatial at 41388b8b, the others at 7710d059. Its two later kinds, 3d_spatial and numeracy, are fetched.
"""

from __future__ import annotations

import functools

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_shipped_prompts


def color_prompts() -> list[Prompt]:
    """Two or more things, each in a color of its own."""
    return list(_of_kind("color"))


def shape_prompts() -> list[Prompt]:
    """Two or more things, each of a shape of its own."""
    return list(_of_kind("shape"))


def texture_prompts() -> list[Prompt]:
    """Two or more things, each of a material of its own."""
    return list(_of_kind("texture"))


def spatial_prompts() -> list[Prompt]:
    """Two things, and where one is to the other."""
    return list(_of_kind("spatial"))


def non_spatial_prompts() -> list[Prompt]:
    """People, animals and things, and what they do."""
    return list(_of_kind("non_spatial"))


def complex_prompts() -> list[Prompt]:
    """Several things with properties and relations, in longer sentences."""
    return list(_of_kind("complex"))


@functools.cache
def _of_kind(kind: str) -> tuple[Prompt, ...]:
    """The list of a kind, which stands in the metadata as ``tag``."""
    prompts = read_shipped_prompts(f"lists/t2i-compbench/{kind}_val.txt")
    return tuple(Prompt(prompt.text, {"tag": kind}, place=prompt.place) for prompt in prompts)
