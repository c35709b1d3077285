"""Requests to servers that may be anybody's: they drip, never end, redirect, and the environment names proxies."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import load_reward
from dgpo_plugin.rewards.served import client, endpoint, http_client, judge
from dgpo_plugin.rewards.served.client import RemoteReward
from dgpo_plugin.rewards.served.http_client import RequestFailed, ask, checked_urls

pytestmark = pytest.mark.fast

Sends = Callable[[bytes], None]


@contextmanager
def answering(answer: Callable[[bytes, Sends, threading.Event], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request and hands it on with what sends bytes; its address, and the requests."""
    seen: list[bytes] = []
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(30)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            while length and len(body) < int(length[0].partition(b":")[2]):
                body += connection.recv(65536)
            seen.append(head + b"\r\n\r\n" + body)
            answer(head, connection.sendall, over)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listening.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)


def plainly(content: Any, *headers: str, status: str = "200 OK") -> Callable[[bytes, Sends, threading.Event], None]:
    """An answer in one piece."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers])
    return lambda request, send, over: send(f"{head}\r\n\r\n".encode() + data)


def dripping(beginning: bytes) -> Callable[[bytes, Sends, threading.Event], None]:
    """An answer that begins and then comes in single bytes, for ever."""

    def drip(request: bytes, send: Sends, over: threading.Event) -> None:
        send(beginning)
        while not over.wait(0.05):
            send(b"a")

    return drip


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"]
)
def test_a_time_out_is_the_whole_attempts_and_not_silence(beginning: bytes) -> None:
    """Bytes keep coming before, in and after the head: with silence measured, none of these would ever end."""
    with (
        answering(dripping(beginning)) as (url, seen),
        pytest.raises(RequestFailed, match=r"^no answer in 0.4 s$") as failed,
    ):
        ask(url, {}, timeout=0.4)
    assert len(seen) == 1
    assert failed.value.temporary


def test_a_judge_and_a_remote_reward_give_dripping_servers_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RETRY_PAUSE", 0.0)
    drip = dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
    images, prompts = torch.zeros(1, 3, 4, 4), [Prompt("a")]
    with answering(drip) as (url, seen):
        options = {"url": url, "timeout": 0.4, "attempts": 3}
        with pytest.raises(UserError, match=r"no valid answer in 3 attempts .* no answer in 0.4 s"):
            load_reward("unifiedreward", RewardTerm(options=options))(images, prompts)
        assert len(seen) == 3

    def well_but_slow(request: bytes, send: Sends, over: threading.Event) -> None:
        health = plainly({"name": "n", "version": "1", "ready": True})
        (health if request.startswith(b"GET /health") else drip)(request, send, over)

    with answering(well_but_slow) as (url, _):
        remote = RemoteReward(urls=url, timeout=0.4)
        with pytest.raises(UserError, match=r"no server is left .*no answer in 0.4 s"):
            remote(images, prompts)


def test_an_answer_is_read_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server never ends: what is read after the limit is what the sockets hold."""
    monkeypatch.setattr(http_client, "LONGEST_ANSWER", 10_000)
    sent: list[int] = []

    def endless(request: bytes, send: Sends, over: threading.Event) -> None:
        send(b"HTTP/1.1 200 OK\r\n\r\n")
        while not over.is_set():
            send(b" " * 65536)
            sent.append(65536)

    with (
        answering(endless) as (url, _),
        pytest.raises(RequestFailed, match="an answer of more than 10000 bytes"),
    ):
        ask(url, timeout=30)
    assert sum(sent) < 64 * 2**20


def test_a_small_packed_answer_is_not_unpacked() -> None:
    packed = gzip.compress(b"[" + b" " * 1_000_000 + b"]")
    with answering(plainly(packed, "Content-Encoding: gzip")) as (url, seen):
        with pytest.raises(RequestFailed, match="not JSON"):
            ask(url, timeout=30)
        assert b"accept-encoding: identity" in seen[0].lower()


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent"])
def test_no_redirect_is_followed(status: str) -> None:
    with answering(plainly([])) as (elsewhere, strayed):
        moved = plainly(b"", f"Location: {elsewhere}/health", status=status)
        with answering(moved) as (url, _), pytest.raises(RequestFailed, match=f"^{status[:3]}, ") as failed:
            ask(url, [1], token="secret", timeout=30)
        assert not failed.value.temporary
        assert strayed == []


def test_the_environment_sends_requests_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with answering(plainly([])) as (proxy, strayed), answering(plainly({"ok": 1}, "Set-Cookie: a=b")) as (url, seen):
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert [ask(url, timeout=30), ask(url, timeout=30)] == [{"ok": 1}] * 2
    assert strayed == []
    assert not any(name in request.lower() for request in seen for name in (b"authorization:", b"cookie:"))


def test_headers_are_replaced_or_left_out_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with answering(plainly([])) as (url, seen):
        assert ask(f"{url}/v1", {"a": 1}, token="t", headers={"authorization": None, "X-Key": "k"}, timeout=30) == []
        ask(f"{url}/v1", token="t", timeout=30)
    assert seen[0].startswith(b"POST /v1 HTTP/1.1\r\n")
    assert seen[0].endswith(b'\r\n\r\n{"a": 1}')
    assert b"X-Key: k\r\n" in seen[0]
    assert b"authorization" not in seen[0].lower()
    assert b"Authorization: Bearer t\r\n" in seen[1]
    assert caplog.text == ""


def test_what_is_no_tls_is_not_spoken_to_in_the_clear() -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                heard.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RequestFailed, match="^SSLError: ") as failed:
            ask(f"https://127.0.0.1:{listening.getsockname()[1]}", token="secret", timeout=30)
    assert failed.value.status is None
    assert len(heard) == 1
    assert b"secret" not in heard[0]


def test_certificates_are_verified() -> None:
    """By the context that every request is given."""
    assert http_client.tls_context().check_hostname
    assert http_client.tls_context().verify_mode is ssl.CERT_REQUIRED


def test_the_systems_own_error_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(RequestFailed, match="^ConnectionRefusedError: "):
        ask(f"http://127.0.0.1:{port}", timeout=30)
    with answering(lambda request, send, over: None) as (url, _), pytest.raises(RequestFailed, match="disconnected"):
        ask(url, timeout=30)


def test_a_forked_process_asks_for_itself() -> None:
    with answering(plainly([])) as (url, seen):
        ask(url, timeout=30)
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                ask(url, timeout=10)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert len(seen) == 2


@pytest.mark.parametrize("url", ["http://a b", "http://[::1", "http://exa\x00mple", "http://", "ftp://a", "http://a?b"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="is no address; write it as http://host:port"):
        checked_urls("option urls", url)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300, True, "5"])
def test_a_time_out_that_is_none(timeout: Any) -> None:
    for reward, options in (("remote", {"urls": "http://a"}), ("unifiedreward", {"url": "http://a"})):
        with pytest.raises(UserError, match="option timeout must be more than 0 and at most"):
            load_reward(reward, RewardTerm(options={**options, "timeout": timeout}))


@pytest.mark.parametrize("count", [0, True, 1.5, "3"])
def test_a_count_that_is_none(count: Any) -> None:
    for reward, name, options in (
        ("remote", "batch_size", {"urls": "http://a"}),
        ("unifiedreward", "concurrency", {"url": "http://a"}),
        ("unifiedreward", "attempts", {"url": "http://a"}),
    ):
        with pytest.raises(UserError, match=f"option {name} must be at least 1 and a whole number"):
            load_reward(reward, RewardTerm(options={**options, name: count}))


# ---- busy servers


def busy_then(answer: Any, times: int, status: str = "429 Too Many Requests") -> Callable[..., None]:
    left = [plainly({"error": "busy"}, "Retry-After: 0.01", status=status)] * times
    health = plainly({"name": "n", "version": "1", "ready": True})

    def reply(request: bytes, send: Sends, over: threading.Event) -> None:
        if request.startswith(b"GET /health"):
            health(request, send, over)
        else:
            (left.pop() if left else plainly({"name": "n", "version": "1", **answer}))(request, send, over)

    return reply


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_busy_server_is_waited_for_and_not_left_out(status: str, caplog: pytest.LogCaptureFixture) -> None:
    with answering(busy_then({"rewards": [1.5]}, 3, status)) as (url, seen):
        assert RemoteReward(urls=url)(torch.zeros(1, 3, 4, 4), [Prompt("a")]).tolist() == [1.5]
        assert len(seen) == 5
    with answering(busy_then({"problems": ["no"]}, 3, status)) as (url, _):
        assert RemoteReward(urls=url).check([Prompt("a")]) == ["no"]
    assert caplog.text == ""


def test_others_go_on_while_one_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The busy one asks for a day, and gets it: nothing would end if anybody waited for it."""
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 86400.0)
    left_alone = plainly({"error": "busy"}, "Retry-After: 86400", status="429 Too Many Requests")
    health = plainly({"name": "n", "version": "1", "ready": True})

    def busy(request: bytes, send: Sends, over: threading.Event) -> None:
        (health if request.startswith(b"GET") else left_alone)(request, send, over)

    with answering(busy) as (one, _), answering(busy_then({"rewards": [2.0]}, 0)) as (two, _):
        remote = RemoteReward(urls=[one, two], batch_size=1)
        assert remote(torch.zeros(3, 3, 4, 4), [Prompt("a")] * 3).tolist() == [2.0] * 3


def test_patience_with_a_busy_server_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 3.0)  # each such answer counts as a second at least
    with answering(busy_then({"rewards": [1.0]}, 99)) as (url, seen):
        remote = RemoteReward(urls=url)
        with pytest.raises(UserError, match=r"no server is left .*429, busy"):
            remote(torch.zeros(1, 3, 4, 4), [Prompt("a")])
    assert 5 < len(seen) < 12
