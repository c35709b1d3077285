"""What is done to valid inputs: bits, cuts, splices, values of another type and numbers at the edge."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**90, 0.5, -0.0, 1e300, 1e-300, float("nan"), float("inf")),
    *("", " ", "x", "0", "nan", "true", "a" * 3000, "\ud800", "\0", "\x1b[31m", "a\nerror: b", "\u202e", "../../x"),
    *([], [1], [[]], {}, {"x": 1}, [None], ["a", 1]),
)
YAML_VALUES = (
    *("", "~", "null", "true", "false", "yes", "no", "on", "0", "1", "-1", "2", "3.0", "1.5", ".5", "1e-4", "1e5"),
    *("1.0e-300", "1.0e+300", "1.0e+400", ".nan", "-.inf", "010", "0x10", "0b11", "1_000", "1:30:00", "2026-01-01"),
    *(str(2**31), str(2**63 - 1), str(2**63), "9" * 90, "9" * 4400, "0x" + "f" * 5000, "[]", "[1, 2]", "{}", "{a: 1}"),
    *('"\\ud800"', '"\\0"', '"\\e[31m"', "'1'", "x", "x" * 3000, "é", "../x", "/dev/zero", "/dev", "a.py:b", ".py:"),
    *(
        "!!int 3",
        "!!set {a}",
        "!!python/name:os.system",
        "*a",
        "&a [*a]",
        "<<",
        "=",
        "- 1",
        "a: b",
        "[" * 2000,
        "'",
        "%",
    ),
    *(
        "'a\n\n  error: b'",
        "auto",
        "cpu",
        "cuda:99",
        "dgpo",
        "flow-grpo",
        "shapes",
        "hf:a/b",
        "x" * 300 + ".txt",
        "ocr",
    ),
)


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """A few bits flipped, a cut, a piece taken out, doubled or moved, or bytes put in."""
    content, size = bytearray(data or b"\0"), max(1, len(data))
    at, length = random.randrange(size), random.choice((1, 2, 4, 8, 64, 1024))
    match random.randrange(7):
        case 0 | 1:
            for _ in range(random.choice((1, 1, 2, 8))):
                content[random.randrange(size)] ^= 1 << random.randrange(8)
        case 2:
            del content[at:]
        case 3:
            del content[at : at + length]
        case 4:
            content[at:at] = content[at : at + length]
        case 5:
            piece = random.choice(
                (b"\0" * length, b"\xff" * length, random.randbytes(length), b"\n", b'"', b"\xed\xa0\x80")
            )
            content[at : at + random.choice((0, len(piece)))] = piece
        case 6:
            other = random.randrange(size)
            content[at : at + length] = content[other : other + length]
    return bytes(content)


def mutated_lines(text: str, random: Random) -> str:
    """A text of lines with one of them gone, doubled, moved, indented, or its value another."""
    lines = text.split("\n")
    at = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(random.randrange(len(lines) + 1), lines[at])
        case 2:
            lines[at] = random.choice((" ", "  ", "\t", "- ", "# ", "? ")) + lines[at]
        case 3:
            lines[at] = lines[at].lstrip()
        case 4:
            lines[at] = mutated_bytes(lines[at].encode("utf-8", "surrogatepass"), random).decode("utf-8", "replace")
        case _:
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {random.choice(YAML_VALUES)}"
    return "\n".join(lines)


def mutated_json(value: Any, random: Random) -> Any:
    """A JSON value with one of the values in it another, gone, doubled or under another key."""
    whole = copy.deepcopy(value)
    places = list(_places(whole))
    if not places:
        return random.choice(JSON_VALUES)
    holder, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(("", "x", f"{key}x", str(key).upper(), "\ud800", "a" * 500, "\n"))] = holder.pop(key)
        case 1 | 2 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case 3:
            other, name = random.choice(places)
            holder[key] = copy.deepcopy(other[name]) if (other, name) != (holder, key) else None
        case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice((holder[key] * -1, holder[key] + 1, holder[key] * 1e10, str(holder[key])))
        case 5 if isinstance(holder[key], str):
            holder[key] = mutated_bytes(holder[key].encode(), random).decode("utf-8", "replace")
        case _:
            holder[key] = copy.deepcopy(random.choice(JSON_VALUES))
    return whole


def _places(value: Any) -> Any:
    """Every place in a JSON value: what holds it, and its key or number there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inside):
        yield value, key
        yield from _places(each)
