"""Reward servers under pressure: clients that drip or idle, too many requests, signals, and rewards that fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import Reward
from dgpo_plugin.rewards.served import connections, worker
from dgpo_plugin.rewards.served.client import RemoteReward
from dgpo_plugin.rewards.served.http_client import RequestFailed, ask
from dgpo_plugin.rewards.served.wire import as_png
from tests.dgpo_plugin.served_rewards import serving

pytestmark = pytest.mark.fast

BODY = {"images": [as_png(torch.zeros(3, 4, 4))], "prompts": [{"text": "a"}]}
HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n"
BEGINNINGS = {
    "idle": b"",
    "half a head": b"POST /score HT",
    "no body": HEAD + b"\r\n",
    "half a body": HEAD + b'\r\n{"images": [',
}


def mean(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.mean((1, 2, 3))


@contextlib.contextmanager
def crowd(address: str, beginning: bytes, count: int) -> Iterator[list[socket.socket]]:
    """So many clients that begin a request and never end it."""
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=60)))
            clients[-1].sendall(beginning)
        yield clients


@pytest.mark.parametrize("token", [None, "right"])
@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_those_who_dawdle_keep_nobody_waiting(
    beginning: bytes, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of their times has come: a good client would wait for ever if it waited for them."""
    for name in ("HEAD_SECONDS", "READ_SECONDS", "SILENCE_SECONDS"):
        monkeypatch.setattr(connections, name, 3600.0)
    monkeypatch.setattr(connections, "CONNECTIONS", 20)
    with serving(mean, token=token) as address:
        with crowd(address, beginning, 100):
            for _ in range(3):
                assert ask(f"{address}/score", BODY, token=token, timeout=60)["rewards"] == [0.0]
        assert ask(f"{address}/health", token=token, timeout=60)["ready"] is True


def test_a_thousand_idle_connections_keep_nobody_waiting() -> None:
    with serving(mean) as address, crowd(address, b"POST", 400), crowd(address, HEAD + b"\r\n{", 600):
        assert ask(f"{address}/score", BODY, timeout=60)["rewards"] == [0.0]


def test_the_token_is_looked_at_before_the_body() -> None:
    """The answer comes while the body is still owed."""
    with serving(mean, token="right") as address, crowd(address, HEAD + b"\r\n{", 1) as (client,):
        assert client.recv(12) == b"HTTP/1.1 401"


def test_bytes_that_are_held_have_a_bound() -> None:
    """The oldest that is not whole gives way, and a good client finds room."""
    half = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 30000\r\n\r\n" + b" " * 29_000
    with serving(mean, most_bytes=30_000) as address, crowd(address, half, 40) as clients:
        assert ask(f"{address}/score", BODY, timeout=60)["rewards"] == [0.0]
        assert clients[0].recv(1) == b""


# ---- one at a time


def when_it_is_let_in(address: str) -> Any:
    """The rewards of a request that is sent until there is a place for it."""
    while True:
        try:
            return ask(f"{address}/score", BODY, timeout=60)["rewards"]
        except RequestFailed as error:
            if error.status != 429:
                raise


def refused(address: str) -> RequestFailed:
    """The answer once there is no place left; before, the request itself waits for a moment."""
    while True:
        try:
            ask(f"{address}/check", {"prompts": []}, timeout=0.3)
        except RequestFailed as error:
            if error.status is not None:
                return error


def test_further_requests_than_can_wait_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WAITING", 2)
    begun, go_on = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        begun.set()
        assert go_on.wait(60)
        return mean(images, prompts)

    answers: list[Any] = []
    with serving(slow) as address:

        def score() -> None:
            answers.append(when_it_is_let_in(address))

        threads = [threading.Thread(target=score) for _ in range(3)]
        threads[0].start()
        assert begun.wait(60)
        for thread in threads[1:]:
            thread.start()
        full = refused(address)
        assert str(full) == "429, 2 requests wait already; come again"
        assert full.retry_after == 1
        assert full.busy
        assert ask(f"{address}/health", timeout=60)["ready"] is True
        go_on.set()
        for thread in threads:
            thread.join()
        remote = RemoteReward(urls=address)
        assert remote(torch.zeros(2, 3, 4, 4), [Prompt("a")] * 2).tolist() == [0.0, 0.0]
    assert answers == [[0.0]] * 3


def test_a_request_whose_client_went_away_is_not_scored() -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def slow(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(prompts[0].text)
        begun.set()
        assert go_on.wait(60)
        return mean(images, prompts)

    with serving(slow) as address:
        first = threading.Thread(target=ask, args=(f"{address}/score", BODY), kwargs={"timeout": 60})
        first.start()
        assert begun.wait(60)
        with pytest.raises(RequestFailed, match=r"no answer in 0.3 s"):
            ask(f"{address}/score", {**BODY, "prompts": [{"text": "given up"}]}, timeout=0.3)
        ask(f"{address}/health", timeout=60)
        go_on.set()
        first.join()
        ask(f"{address}/score", {**BODY, "prompts": [{"text": "last"}]}, timeout=60)
    assert seen == ["a", "last"]


def test_a_reward_that_hangs_is_one_line_to_every_client_and_the_server_lives() -> None:
    go_on = threading.Event()

    def hangs(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if prompts[0].text == "a":
            go_on.wait(60)
        return mean(images, prompts)

    with serving(hangs, timeout=0.2) as address:
        for _ in range(2):
            with pytest.raises(RequestFailed, match=r"^504, the reward has not answered in 0.2 s and its call goes on"):
                ask(f"{address}/score", BODY, timeout=60)
        assert ask(f"{address}/health", timeout=60)["ready"] is False
        with pytest.raises(UserError, match="is not ready"):
            RemoteReward(urls=address)
        go_on.set()
        while not ask(f"{address}/health", timeout=60)["ready"]:
            time.sleep(0.01)
        assert ask(f"{address}/score", {**BODY, "prompts": [{"text": "b"}]}, timeout=60)["rewards"] == [0.0]


class Unreadable(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(0), "500, SystemExit: 0"),
        (KeyboardInterrupt(), "500, KeyboardInterrupt"),
        (GeneratorExit(), "500, GeneratorExit"),
        (StopIteration(), "500, StopIteration"),
        (asyncio.CancelledError(), "500, CancelledError"),
        (Unreadable(), "500, Unreadable"),
        (RuntimeError("two\nlines"), "500, RuntimeError: two"),
        (UserError("not\nthis"), r"422, reward plain: not\\nthis"),
        ("nonsense", "422, reward plain: returned"),
        ({"a": 1}, "422, reward plain: returned"),
    ],
)
def test_whatever_a_reward_does_is_one_line_and_the_server_lives(error: Any, said: str) -> None:
    class Odd(Reward):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
            if prompts[0].text == "good":
                return [1.0]
            if isinstance(error, BaseException):
                raise error
            return error

        def check(self, prompts: Sequence[Prompt]) -> Any:
            return self(torch.zeros(1, 3, 4, 4), prompts)

    with serving(Odd()) as address:
        with pytest.raises(RequestFailed, match=f"^{said}") as failed:
            ask(f"{address}/score", BODY, timeout=60)
        assert "\n" not in str(failed.value)
        with pytest.raises(RequestFailed, match=f"^{said[:3]}, "):
            ask(f"{address}/check", {"prompts": [{"text": "a"}]}, timeout=60)
        good = {**BODY, "prompts": [{"text": "good"}]}
        assert ask(f"{address}/score", good, timeout=60)["rewards"] == [1.0]


# ---- the command


OWN = """
import time
from pathlib import Path

def slow(images, prompts):
    Path("begun").touch()
    while not Path("go_on").exists():
        time.sleep(0.01)
    return images.mean((1, 2, 3))
"""


@contextlib.contextmanager
def command(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``dgpo serve-reward`` as users start it; its address."""
    (folder / "own.py").write_text(OWN)
    started = subprocess.Popen(
        [sys.executable, "-m", "dgpo_plugin", "serve-reward", "own.py:slow", "--port", "0", *options],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs this in the background makes it deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        yield started, line.split(" at ")[1].split(";")[0]
    finally:
        started.kill()
        started.communicate()


def in_flight(address: str, folder: Path) -> tuple[threading.Thread, list[Any]]:
    """A request that the server is at, and what comes of it."""
    outcome: list[Any] = []

    def score() -> None:
        try:
            outcome.append(ask(f"{address}/score", BODY, timeout=60)["rewards"])
        except RequestFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    while not (folder / "begun").exists():
        time.sleep(0.01)
    return thread, outcome


def hung_up(address: str) -> RequestFailed:
    """What a new client meets, a moment after the signal."""
    while True:
        try:
            ask(f"{address}/health", timeout=60)
        except RequestFailed as error:
            return error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_requests_in_flight(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with command(tmp_path) as (started, address):
        thread, outcome = in_flight(address, tmp_path)
        started.send_signal(number)
        assert started.stdout is not None
        assert started.stdout.readline() == "answering the requests in flight; a second signal ends at once\n"
        # Refused; or hung up on, if it came in the moment before the listening ends.
        assert re.search("ConnectionRefusedError|disconnected|reset", str(hung_up(address)))
        (tmp_path / "go_on").touch()
        thread.join()
        _, errors = started.communicate(timeout=60)
    assert outcome == [[0.0]]
    assert started.returncode == code
    assert errors == ("" if code == 0 else "stopped; the requests in flight were answered\n")


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with command(tmp_path) as (started, address):
        thread, outcome = in_flight(address, tmp_path)
        started.send_signal(signal.SIGTERM)
        assert started.stdout is not None
        started.stdout.readline()
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=60)
        thread.join()
    assert started.returncode == 128 + signal.SIGTERM
    assert isinstance(outcome[0], RequestFailed)


def test_requests_are_logged_when_asked_for(tmp_path: Path) -> None:
    with command(tmp_path, "--log-requests") as (started, address):
        ask(f"{address}/health", timeout=60)
        with pytest.raises(RequestFailed):
            ask(f"{address}/nothing%0Ahere", timeout=60)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=60)
    assert errors.splitlines() == ["127.0.0.1 GET /health 200", "127.0.0.1 GET /nothing%0Ahere 404"]


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_its_packages_the_command_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("server", "answers", "connections"):
        monkeypatch.delitem(sys.modules, f"dgpo_plugin.rewards.served.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(main, ["serve-reward", "shapes"])
    assert result.exit_code == 2
    assert result.output == f"error: serve-reward needs {missing}; pip install 'dgpo-plugin[server]'\n"
