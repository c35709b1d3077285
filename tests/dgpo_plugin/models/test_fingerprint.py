"""Fingerprints of weights: the same for rounded copies, another one for other weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgpo_plugin.models.fingerprint import (
    MOST_TENSORS,
    SAMPLE,
    Mark,
    compared,
    mark,
    packed,
    shortened,
    unpacked,
)

pytestmark = pytest.mark.fast

Weights = dict[str, Tensor]
F32, F16, BF16, E4M3, E5M2 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def weights(std: float = 0.03, seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    shapes = [(128, 96), (96,), (64, 3, 3, 3), (300, 300), (1,)] * 8
    return {f"layer {n}": std * torch.randn(shape) for n, shape in enumerate(shapes)}


def marks(tensors: Weights) -> dict[bytes, Mark]:
    made = [mark(name, tensor) for name, tensor in tensors.items()]
    return unpacked(packed([each for each in made if each is not None]))


def cast(tensors: Weights, *kinds: torch.dtype) -> Weights:
    for kind in kinds:
        tensors = {name: t.to(kind) for name, t in tensors.items()}
    return tensors


@pytest.mark.parametrize("kinds", [(F32,), (torch.float64,), (torch.float64, F32)])
def test_nothing_is_lost(kinds: tuple[torch.dtype, ...]) -> None:
    assert compared(marks(weights()), marks(cast(weights(), *kinds))) == "the same"


@pytest.mark.parametrize("kinds", [(F16, F32), (BF16, F32), (F16, torch.float64), (BF16, F32, BF16)])
def test_a_wider_type_for_the_same_numbers(kinds: tuple[torch.dtype, ...]) -> None:
    assert compared(marks(cast(weights(), kinds[0])), marks(cast(weights(), *kinds))) == "the same"


@pytest.mark.parametrize("std", [1e-4, 0.03, 3.0])
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ((F32,), (F16,)),
        ((F32,), (BF16,)),
        ((F16,), (F32,)),
        ((F16,), (BF16,)),
        ((BF16,), (F16,)),
        ((F32,), (F16, F32)),
        ((F32,), (BF16, F32)),
        ((F32,), (F16, BF16)),
        ((F32,), (E4M3,)),
        ((F32,), (E4M3, F16)),
        ((BF16,), (E4M3, F32)),
        ((E5M2, F16), (F32,)),
        ((BF16,), (E4M3,)),
        ((F16,), (E5M2,)),
    ],
)
def test_rounding_is_told(then: tuple[torch.dtype, ...], now: tuple[torch.dtype, ...], std: float) -> None:
    """In either direction, and also what was stored wider again afterwards, or became zero for being so small."""
    pair = [marks(cast(weights(std), *kinds)) for kinds in (then, now)]
    allowed = {"the same but rounded"} | ({"the same"} if F16 in now and std == 3.0 and BF16 in then else set())
    assert compared(*pair) in allowed
    assert compared(*reversed(pair)) in allowed


def trained(amount: float, only: str = "") -> Weights:
    torch.manual_seed(9)
    return {
        name: t + (amount * 0.03 * torch.randn(t.shape) if only in ("", name) else 0) for name, t in weights().items()
    }


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (weights(seed=1), F32),
        (trained(0.001), F32),
        (trained(0.01), F16),
        (trained(0.03), BF16),
        (trained(0.1), BF16),
        (trained(0.05, only="layer 8"), F16),
        (trained(0.2, only="layer 8"), BF16),
        (trained(0.0001, only="layer 8"), F32),
        ({name: -t for name, t in weights().items()}, F16),
        ({name: t * 1.05 for name, t in weights().items()}, BF16),
        ({name: t.flip(0) for name, t in weights().items()}, F16),
        ({name: torch.zeros_like(t) for name, t in weights().items()}, F16),
        ({name: t[: len(t) // 2 + 1] for name, t in weights().items()}, F32),
        ({name: t.clone().fill_(math.nan) for name, t in weights().items()}, F16),
    ],
)
def test_other_weights_are_told_through_rounding(other: Weights, kind: torch.dtype) -> None:
    assert compared(marks(weights()), marks(cast(other, kind))) == "differs"


def test_two_of_one_type_are_no_roundings_of_each_other() -> None:
    assert compared(marks(cast(weights(), BF16)), marks(cast(trained(0.004), BF16))) == "differs"


def test_too_little_in_common_cannot_be_told() -> None:
    renamed = {f"model.{name}": t for name, t in weights().items()}
    assert compared(marks(weights()), marks(renamed)) == "cannot be told"
    assert compared(marks(weights()), {}) == "cannot be told"
    few = dict(list(weights().items())[:15])
    assert compared(marks(weights()), marks({**few, **renamed})) == "cannot be told"
    assert compared(marks(weights()), marks(few)) == "the same"


def test_no_more_than_the_largest_are_kept() -> None:
    many = {f"x {n}": torch.ones(1 + n) for n in range(MOST_TENSORS + 20)}
    kept = unpacked(packed([found for name, t in many.items() if (found := mark(name, t))]))
    assert len(kept) == MOST_TENSORS
    assert min(each.count for each in kept.values()) == 21
    cut = unpacked(shortened(packed(list(kept.values())), 3))
    assert sorted(each.count for each in cut.values()) == [MOST_TENSORS + n for n in (18, 19, 20)]


def test_a_large_tensor_is_looked_at_everywhere() -> None:
    tensor = torch.randn(SAMPLE * 3 + 7)
    before, after = mark("x", tensor), mark("x", torch.cat([tensor[: -SAMPLE // 4], torch.zeros(SAMPLE // 4)]))
    assert before is not None
    assert after is not None
    assert before.count == SAMPLE * 3 + 7
    assert after.norm < 0.99 * before.norm


@pytest.mark.parametrize("tensor", [torch.arange(3), torch.ones(3, dtype=torch.bool), torch.empty(0)])
def test_what_has_no_point_has_no_mark(tensor: Tensor) -> None:
    assert mark("x", tensor) is None


@pytest.mark.parametrize("text", ["?", "AAAA", "ä", "A" * 21])
def test_a_text_that_is_no_fingerprint_has_no_marks(text: str) -> None:
    assert unpacked(text) == {}


def test_the_signs_never_change() -> None:
    """Fingerprints in files of old must stay comparable."""
    found = mark("x", torch.arange(1000, dtype=F32))
    assert found is not None
    assert (found.count, found.types, found.stored) == (1000, 0b0111, 1)
    assert (found.norm, found.first_sum, found.second_sum) == pytest.approx((18243.73, 1176.0, 15744.0), abs=0.1)
