"""Hostile requests for a reward server: made from a seed, sent over a real socket, answered in one line.

A server that is well answers 200, or 4xx with ``{"error": one line}``; a request that is not whole may be hung up on.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import random
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import as_reward
from dgpo_plugin.rewards.served.server import RewardServer
from tests.fuzz.picture_files import picture

TOKEN = "a-token-of-the-campaign"
MOST_BYTES = 2**20
SECONDS = 30.0
"""Within which an answer must have come; the limits of the server itself are shorter."""


@dataclass(frozen=True)
class Case:
    """Bytes that are sent over a connection.

    Attributes:
        kind: how they were made.
        whole: whether they are sure to hold a whole request, so that an answer must come.
    """

    kind: str
    data: bytes
    whole: bool = True


def cases(seed: int, count: int) -> list[Case]:
    """So many cases, the same for the same seed; a further one depends on no other."""
    return [_case(random.Random(f"{seed} {number}")) for number in range(count)]


def run(case: Case) -> None:
    """Send a case to a server in this process, and look at the answer and at the server after it.

    Raises:
        AssertionError: the answer is none that a server gives, or the server is no longer well.
    """
    answer = _exchanged(case.data, whole=case.whole)
    if case.whole or answer:
        _check(answer, bodiless=case.data.startswith(b"HEAD "))
    health = _exchanged(_request({}, "GET", "/health"))
    assert health.startswith(b"HTTP/1.1 200 "), f"the server is not well after it: {health[:200]!r}"


def _check(answer: bytes, *, bodiless: bool) -> None:
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert status == 200 or 400 <= status < 500, f"answered {answer[:300]!r}"
    if bodiless and not body:
        return
    content = json.loads(body)
    assert b"\n" not in body
    if status == 200:
        assert {"name", "version"} < content.keys()
    else:
        assert content.keys() == {"error"}
        assert content["error"].isprintable(), content
        assert 0 < len(content["error"]) < 4000
        assert "Traceback" not in content["error"]


def _exchanged(data: bytes, *, whole: bool = True) -> bytes:
    """What comes back for bytes: one answer, or nothing if the server hangs up."""
    parts: list[bytes] = []
    with socket.create_connection(_server(), timeout=SECONDS) as connection:
        try:
            connection.sendall(data)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            while not _is_whole(b"".join(parts)) and (part := connection.recv(65536)):
                parts.append(part)
        except ConnectionError:
            pass
    return b"".join(parts)


def _is_whole(answer: bytes) -> bool:
    """Whether an answer has come as its head says: the server may still be taking what it is sent."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
    return length is not None and len(body) >= int(length.group(1))


@functools.cache
def _server() -> tuple[str, int]:
    """Where a server listens, started when it is asked for first, for as long as the process lives."""

    def mean(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean((1, 2, 3))

    made = RewardServer(as_reward(mean), ("mean", "1"), token=TOKEN, most_bytes=MOST_BYTES)
    threading.Thread(target=made.run, daemon=True).start()
    return made.address


# ---- how they are made


def _request(content: Any, method: str = "POST", path: str = "/score", *lines: str, token: str = TOKEN) -> bytes:
    """A request that is right but for what it is given."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    given = [f"{method} {path} HTTP/1.1", "Host: a", f"Authorization: Bearer {token}", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        given.append(f"Content-Length: {len(data)}")
    return "\r\n".join(given).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + data


def _good(draw: random.Random) -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (draw.randrange(256), 0, 0)).save(out, format="PNG")
    count = draw.randrange(1, 4)
    return {
        "images": [base64.b64encode(out.getvalue()).decode()] * count,
        "prompts": [{"text": "a", "metadata": {"n": 1}} for _ in range(count)],
    }


def _value(draw: random.Random) -> Any:
    """What may stand where something else should."""
    nested: Any = 1
    for _ in range(draw.choice([3, 60, 70, 400])):
        nested = [nested] if draw.random() < 0.5 else {"a": nested}
    odd = [
        None,
        True,
        0,
        -1,
        1e308,
        10**400,
        "",
        "\ud800",
        "\0",
        "é" * 99,
        "a" * 9999,
        [],
        {},
        [[]],
        {"text": 1},
        nested,
    ]
    return draw.choice([*odd, float("nan"), float("inf")])


def _wrong_content(draw: random.Random) -> bytes:
    """A body whose JSON is right, and whose content is not."""
    content = _good(draw)
    key = draw.choice(["images", "prompts"])
    place: Any = draw.choice(["whole", "item", "inner", "key", "less", "twice"])
    if place == "whole":
        content[key] = _value(draw)
    elif place == "item":
        content[key][draw.randrange(len(content[key]))] = _value(draw)
    elif place == "inner":
        content["prompts"][0][draw.choice(["text", "metadata", "other"])] = _value(draw)
    elif place == "key":
        content[draw.choice(["more", "", "Images"])] = _value(draw)
    elif place == "less":
        del content[key]
    else:
        return json.dumps(content).replace("{", '{"images": [], ', 1).encode()
    return json.dumps(content).encode()


def _broken_json(draw: random.Random) -> bytes:
    data = bytearray(json.dumps(_good(draw)).encode())
    kinds = [
        bytes(data[: draw.randrange(len(data))]),
        b"[" * draw.choice([10, 1000, 100_000]),
        b'{"a":' * draw.choice([10, 1000, 100_000]),
        b'{"images": [], "prompts": [' + b"9" * draw.choice([400, 5000, 100_000]) + b"]}",
        b'{"images": [NaN], "prompts": [1e99999]}',
        draw.randbytes(draw.randrange(200)),
        "\ufeff{}".encode(),
        json.dumps(_good(draw)).encode("utf-16"),
        b"",
        b"null",
    ]
    for _ in range(draw.randrange(1, 6)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return draw.choice([*kinds, bytes(data)])


def _wrong_base64(draw: random.Random) -> bytes:
    content = _good(draw)
    text = content["images"][0]
    at = draw.randrange(len(text))
    wrong = [
        text[:-1],
        text + "=",
        text[:at] + "\n" + text[at:],
        text[:at] + "é" + text[at + 1 :],
        text[::-1],
        "====",
        "A",
    ]
    content["images"][0] = draw.choice([*wrong, text.replace("A", "-"), f"data:image/png;base64,{text}"])
    return json.dumps(content).encode()


def _odd_pictures(draw: random.Random) -> bytes:
    count = draw.choice([1, 1, 1, 2, 3, 257])
    texts = [base64.b64encode(picture(draw)).decode() for _ in range(min(count, 3))]
    return json.dumps({"images": (texts * count)[:count], "prompts": [{"text": "a"}] * count}).encode()


def _odd_check(draw: random.Random) -> bytes:
    prompts = _good(draw)["prompts"]
    prompts[0][draw.choice(["text", "metadata"])] = _value(draw)
    return json.dumps({"prompts": draw.choice([prompts, _value(draw), prompts * 999])}).encode()


def _odd_head(draw: random.Random) -> Case:
    body = json.dumps(_good(draw)).encode()
    length = len(body)
    whole = [
        f"Content-Length: {draw.choice(['-1', '1_0', '0x9', '', ' ', '+5', '9' * 30, '1e3', '٣'])}",
        f"Content-Length: {MOST_BYTES + 1}",
        f"Content-Length: {length}\r\nContent-Length: {length + 1}",
        f"Content-Length: {length}\r\nTransfer-Encoding: chunked",
        f"Transfer-Encoding: {draw.choice(['chunked', 'gzip', 'chunked, chunked', 'identity'])}",
        f"X: {'y' * draw.choice([10, 70_000, 200_000])}",
        "X: y\r\n" * 20_000 + "Z: z",
        f"Expect: {draw.choice(['100-continue', 'the-worst'])}",
        "Connection: upgrade\r\nUpgrade: " + draw.choice(["websocket", "h2c"]),
        "Connection: keep-alive, close",
        "Content-Type: " + draw.choice(["text/html", "multipart/form-data", "x" * 500, ""]),
        "Content-Encoding: gzip",
        "no colon here",
        " folded: line",
        "X\0: y",
        "X: a\0b",
        "Host: b",
        "Cookie: " + "a=b; " * 999,
        "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https",
        "Range: bytes=0-1\r\nIf-None-Match: *",
    ]
    line = draw.choice(whole)
    owed = draw.choice([f"Content-Length: {length + draw.choice([1, 99, 9999])}", ""]) if draw.random() < 0.2 else ""
    return Case("head", _request(body, "POST", "/score", owed or line), whole=not owed and "Upgrade" not in line)


def _odd_line(draw: random.Random) -> Case:
    """Another method, path or version."""
    method = draw.choice(
        ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW", "post", "POST", "P" * 300]
    )
    paths = [
        "/",
        "/score",
        "/health",
        "/check",
        "/score/",
        "//score",
        "/../score",
        "/%2e%2e/score",
        "/score?x=1",
        "/%00",
    ]
    paths += [
        "/%ff%fe",
        "/score%0d%0aX: y",
        "/\u00fc",
        "*",
        "http://a/score",
        "a:80",
        "",
        "/" + "a" * 70_000,
        "/score#x",
        "/a b",
    ]
    path = draw.choice(paths)
    data = _request({}, method, path)
    if draw.random() < 0.3:
        data = data.replace(
            b"HTTP/1.1", draw.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9", b"http/1.1", b"ICY"]), 1
        )
    return Case("line", data)


def _odd_token(draw: random.Random) -> Case:
    body = json.dumps(_good(draw)).encode()
    wrong = ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é", "\udcff", TOKEN + " ", "a" * 9999, TOKEN + "\0"]
    return Case("token", _request(body, "POST", draw.choice(["/score", "/nothing"]), token=draw.choice(wrong)))


def _no_request(draw: random.Random) -> Case:
    good = _request(_good(draw))
    hello = bytes.fromhex("16030100c8010000c40303") + draw.randbytes(200)
    kinds = [
        b"",
        b"\r\n" * 99,
        hello,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        draw.randbytes(draw.randrange(999)),
        good[:-1],
    ]
    return Case("no request", draw.choice([*kinds, good[: draw.randrange(len(good))]]), whole=False)


def _case(draw: random.Random) -> Case:
    bodies: dict[str, Callable[[random.Random], bytes]] = {
        "content": _wrong_content,
        "json": _broken_json,
        "base64": _wrong_base64,
        "pictures": _odd_pictures,
        "more pictures": _odd_pictures,
        "check": _odd_check,
    }
    others: list[Callable[[random.Random], Case]] = [_odd_head, _odd_head, _odd_line, _odd_token, _no_request]
    chosen = draw.randrange(len(bodies) + len(others))
    if chosen >= len(bodies):
        return others[chosen - len(bodies)](draw)
    kind = list(bodies)[chosen]
    return Case(kind, _request(bodies[kind](draw), "POST", "/check" if kind == "check" else "/score"))
