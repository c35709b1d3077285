"""Fingerprints of weights that outlive rounding: the same for a copy cast to another type, sharded or renamed.

Of each tensor a few bytes are kept: how many numbers it has, in which types these can be written without loss, their
norm, and two sums of them under random signs. Rounding moves such a sum by about the norm times the type's unit
roundoff, another training by far more; and two tensors that can be written in the very same types are no roundings of
each other. So the same numbers, rounded ones and other ones can be told apart with a few kilobytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["the same", "the same but rounded", "differs", "cannot be told"]

SAMPLE = 1 << 16
"""Numbers of a tensor that are looked at, evenly spread."""
MOST_TENSORS = 512
"""In a fingerprint; the largest ones."""
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Bit n of a mark's ``types`` is for the n-th of these."""
EIGHT_BITS = 0b110000
"""The bits of the types of eight bits: almost nothing that is stored in another fits into those, but zeros, which could
then be anything small. So they count where most of a base's numbers fit: it was in eight bits once."""
ROUNDOFF = (2.0**-53, 2.0**-24, 2.0**-11, 2.0**-8, 2.0**-4, 2.0**-3)
"""Largest relative error of rounding to each of them."""
LEAST = (0.0, 2.0**-150, 2.0**-25, 2.0**-134, 2.0**-10, 2.0**-17)
"""Largest absolute error of it among the smallest numbers: half a step."""
NOISE = 1e-6
"""Relative; a difference that the fingerprint's own float32 makes."""
MOST_SIGMAS = 6.0
"""By how many standard deviations rounding may move a sum: by Hoeffding's bound once in thirty million tensors."""
USUAL_SIGMAS, ENOUGH_TENSORS = 0.9, 16
"""Root mean square over so many tensors that rounding stays below: it is .4 by nearest, .8 by cutting off."""
_RECORD = struct.Struct("<4sIBBfff")


@dataclass(frozen=True)
class Mark:
    """What is kept of a tensor.

    Attributes:
        name: four bytes of its name's SHA-256.
        count: of its numbers.
        types: the type that it is stored in and all that hold its numbers without loss, as bits.
        stored: which of :data:`TYPES` it is stored in.
        norm, first_sum, second_sum: of the sample; the sums with random signs.
    """

    name: bytes
    count: int
    types: int
    stored: int
    norm: float
    first_sum: float
    second_sum: float


def mark(name: str, tensor: Tensor, stored: torch.dtype | None = None) -> Mark | None:
    """The mark of a tensor; None for one that is empty or no numbers with a point.

    Args:
        name: as diffusers has it in the model's folder.
        stored: the type that it is kept in, if ``tensor`` is made from that.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return None
    flat = tensor.detach().reshape(-1)
    values = flat[:: _step(flat.numel())].cpu().to(torch.float64)
    kind = stored or tensor.dtype
    types = _held_by(values) | _bit(kind) | _bit(tensor.dtype)
    number = TYPES.index(kind) if kind in TYPES else len(TYPES)
    sums = torch.cat([values.norm()[None], _signs()[:, : len(values)] @ values]).float().tolist()
    return Mark(short(name), min(flat.numel(), 2**32 - 1), types, number, *sums)


def short(name: str) -> bytes:
    """A name's place in a fingerprint."""
    return hashlib.sha256(name.encode()).digest()[:4]


def packed(marks: Iterable[Mark], most: int = MOST_TENSORS) -> str:
    """A fingerprint as text: the marks of the largest tensors, largest first."""
    ordered = sorted(marks, key=lambda each: (-each.count, each.name))[:most]
    records = [_RECORD.pack(*astuple(m)) for m in ordered]
    return base64.b64encode(b"".join(records)).decode()


def shortened(fingerprint: str, most: int) -> str:
    """A fingerprint of the largest tensors of those that are in one."""
    return base64.b64encode(base64.b64decode(fingerprint)[: most * _RECORD.size]).decode()


def unpacked(fingerprint: str) -> dict[bytes, Mark]:
    """The marks of a fingerprint by short name; none of a text that is no fingerprint."""
    try:
        blob = base64.b64decode(fingerprint, validate=True)
        return {record[0]: Mark(*record) for record in _RECORD.iter_unpack(blob)}
    except (ValueError, struct.error):
        return {}


def compared(then: Mapping[bytes, Mark], now: Mapping[bytes, Mark]) -> Verdict:
    """Whether two fingerprints are of the same weights, by the tensors that both have.

    ``cannot be told`` if these are less than half of the smaller one: names that are not known, or packed weights.
    """
    common = then.keys() & now.keys()
    if not common or 2 * len(common) < min(len(then), len(now)):
        return "cannot be told"
    before, after = _once_in_eight_bits(then), _once_in_eight_bits(now)
    moved = [_sigmas(before[name], after[name]) for name in common]
    rounded = [sigmas for sigmas in moved if max(sigmas)]
    if not rounded:
        return "the same"
    mean = math.sqrt(sum((first**2 + second**2) / 2 for _, first, second in rounded) / len(rounded))
    if max(map(max, rounded)) > MOST_SIGMAS or (len(rounded) >= ENOUGH_TENSORS and mean > USUAL_SIGMAS):
        return "differs"
    return "the same but rounded"


def _once_in_eight_bits(marks: Mapping[bytes, Mark]) -> dict[bytes, Mark]:
    """Marks whose types are of eight bits only where the tensor is stored so, or most of all numbers fit."""
    whole = sum(each.count for each in marks.values())
    most = sum(
        1 << n for n in range(len(TYPES)) if 2 * sum(m.count for m in marks.values() if m.types >> n & 1) > whole
    )
    return {
        name: replace(each, types=each.types & (~EIGHT_BITS | most | 1 << each.stored)) for name, each in marks.items()
    }


def _sigmas(then: Mark, now: Mark) -> tuple[float, float, float]:
    """By how many standard deviations of rounding norm and sums differ: 0 if not at all, infinity if by no rounding."""
    other = (math.inf,) * 3
    if then.count != now.count:
        return other
    before, after = ((each.norm, each.first_sum, each.second_sum) for each in (then, now))
    if not all(map(math.isfinite, before + after)):
        return (0.0,) * 3 if math.isfinite(then.norm) == math.isfinite(now.norm) else other
    norm = max(then.norm, now.norm)
    gaps = [abs(old - new) for old, new in zip(before, after, strict=True)]
    if max(gaps) <= NOISE * norm:
        return (0.0,) * 3
    # What both are written in without loss has rounded neither.
    only = [n for n in range(1, len(TYPES)) if (then.types ^ now.types) >> n & 1]
    sampled = -(-then.count // _step(then.count))
    variance = sum((ROUNDOFF[n] * norm) ** 2 + sampled * LEAST[n] ** 2 for n in only)
    if not variance:
        return other
    first, second, third = (gap / math.sqrt(variance) for gap in gaps)
    return first, second, third


def _step(count: int) -> int:
    """How far apart the numbers of a sample are."""
    return -(-count // SAMPLE)


def _held_by(values: Tensor) -> int:
    """The types that hold numbers, given in float64, without loss."""
    return sum(1 << n for n, kind in enumerate(TYPES) if torch.equal(values.to(kind).to(torch.float64), values))


def _bit(kind: torch.dtype) -> int:
    return 1 << TYPES.index(kind) if kind in TYPES else 0


@functools.cache
def _signs() -> Tensor:
    """The random signs of both sums, (2, SAMPLE), the same for ever."""
    blob = hashlib.shake_256(b"dgpo-plugin fingerprint").digest(2 * SAMPLE // 8)
    bits = torch.tensor(list(blob), dtype=torch.int64)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).view(2, SAMPLE).to(torch.float64)
