"""A stranger's patterns of layers' names: what could take for ever to match is refused, what people write is not."""

from __future__ import annotations

import json

import pytest
import torch

from dgpo_plugin.adapters.scale import DIFFUSERS_HEADER, fold_scale
from dgpo_plugin.common.errors import UserError

pytestmark = [pytest.mark.fast, pytest.mark.timeout(60)]

LAYER = "transformer.single_transformer_blocks.0.attn.to_added_q_norm_out_projection"
TENSORS = {f"{LAYER}.lora_A.weight": torch.ones(2, 3), f"{LAYER}.lora_B.weight": torch.ones(3, 2)}


def scaled(patterns: object) -> float:
    settings = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": patterns}
    folded = fold_scale(TENSORS, {DIFFUSERS_HEADER: json.dumps(settings)})
    return float(folded.tensors[f"{LAYER}.lora_B.weight"][0, 0])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        ".*" * 12 + "x",
        r"\w*" * 12 + "!",
        "(a|a)" * 30 + "x",
        "_?" * 40 + "x",
        ".{1,30}" * 9 + "x",
        "x" * 1000,
        "(" * 200 + ")" * 200,
        "a{65535}{65535}",
        "[",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_a_pattern_that_may_run_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="no usable alpha"):
        scaled({pattern: 4})


def test_more_patterns_than_any_model_has_layers_are_refused() -> None:
    with pytest.raises(UserError, match="alpha_pattern has 6,000 patterns"):
        scaled({f"layer{n}": 4 for n in range(6000)})


@pytest.mark.parametrize(
    "pattern",
    [
        "to_added_q_norm_out_projection",
        r"single_transformer_blocks\.\d+\.attn\..*",
        r"(double|single)_transformer_blocks\.(\d+)\..*_projection",
        r".*attn\.(to_q|to_k|to_v|to_added_q_norm_out_projection)",
    ],
)
def test_a_pattern_that_people_write_is_read(pattern: str) -> None:
    assert scaled({pattern: 8}) == 4.0
