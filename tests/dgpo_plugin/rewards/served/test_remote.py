"""Reward servers and their client, over real sockets: malformed, hostile, killed, hanging, wrong and many."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.config.load import load_config, reward_terms
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards import REWARDS, Reward, as_reward, load_reward, load_rewards
from dgpo_plugin.rewards.served import client, connections
from dgpo_plugin.rewards.served.client import RemoteReward
from dgpo_plugin.rewards.served.server import RewardServer, identity
from dgpo_plugin.rewards.served.wire import as_png, is_loopback
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.worlds.shapes.reward import ShapesReward
from tests.conftest import SMALL
from tests.dgpo_plugin import served_rewards

pytestmark = pytest.mark.fast


def plain(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Depends on every pixel's place, the text and the metadata."""
    places = torch.linspace(-1, 1, images[0].numel()).view_as(images[0])
    extra = torch.tensor([len(prompt.text) + prompt.metadata.get("bonus", 0) for prompt in prompts])
    return torch.stack([(image * places).sum() for image in images]) + extra


def serving(reward: Any = plain, version: str = "1", **options: Any) -> AbstractContextManager[str]:
    """A server in a thread; its address."""
    return served_rewards.serving(reward, version, **options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as address:
        yield address


def identity_of(name: str, *settings: str) -> tuple[str, str]:
    """Name and version that ``dgpo serve-reward`` would tell."""
    terms, scoring = reward_terms([name], settings)
    return identity(name, terms[name], scoring)


def pictures(count: int, seed: int = 0) -> Tensor:
    """8-bit ones, as only these survive the journey unchanged."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 6, 5), generator=generator) / 255


def asked(count: int) -> list[Prompt]:
    return [Prompt("ü" * (at % 5), {"bonus": at / 2} if at % 2 else {}) for at in range(count)]


def call(url: str, body: Any = None, method: str | None = None, path: str = "/score", **headers: str) -> Any:
    """(status, answer) of one request, its body JSON unless it is bytes already."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text else None


# ---- what the client gives is what the reward gives


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(0, 9), size=st.integers(1, 10), seed=st.integers(0, 99))
def test_the_result_is_the_local_one_for_any_batch_size(url: str, count: int, size: int, seed: int) -> None:
    images, prompts = pictures(count, seed), asked(count)
    found = RemoteReward(urls=url, batch_size=size)(images, prompts)
    assert found.dtype == torch.float32
    local = torch.cat([torch.empty(0), *(plain(images[at : at + 1], prompts[at : at + 1]) for at in range(count))])
    assert torch.equal(found, local)


def test_other_pictures_are_rounded_to_8_bits(url: str) -> None:
    images = torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    found = RemoteReward(urls=url)(images, asked(3))
    assert torch.equal(found, plain((images * 255).round() / 255, asked(3)))
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="a picture holds values that are not finite"):
        RemoteReward(urls=url)(images, asked(3))


def test_two_servers_share_the_load() -> None:
    """Each batch waits until the other server has one too: nothing would end if one server did it all."""
    both, used = threading.Barrier(2), []

    def waiting(number: int) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
        def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            both.wait(60)
            used.append(number)
            return plain(images, prompts)

        return reward

    with serving(waiting(0)) as first, serving(waiting(1)) as second:
        found = RemoteReward(urls=[first, second], batch_size=2)(pictures(8), asked(8))
    assert torch.equal(found, plain(pictures(8), asked(8)))
    assert sorted(used) == [0, 0, 1, 1]


def test_a_slow_server_does_not_hold_the_others_up() -> None:
    """It ends its only batch after the other has done all the rest."""
    done, all_the_rest = [], threading.Event()

    def slow(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert all_the_rest.wait(60)
        return plain(images, prompts)

    def quick(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        done.append(1)
        if len(done) == 3:
            all_the_rest.set()
        return plain(images, prompts)

    with serving(slow) as first, serving(quick) as second:
        found = RemoteReward(urls=[first, second], batch_size=2, timeout=30)(pictures(8), asked(8))
    assert torch.equal(found, plain(pictures(8), asked(8)))
    assert len(done) == 3


def test_a_run_trains_with_a_remote_reward() -> None:
    with serving(ShapesReward()) as address:
        chosen = ["rewards=remote", f"rewards.remote.options.urls=[{address}]", "scoring.batch_size=3"]
        trainer = build_trainer(load_config("shapes", [*SMALL, *chosen]))
        remote = next(trainer.iterations())
    assert (
        trainer.scorer.rewards.title == "plain 1 (served)"
    )  # and not "remote", which would tell an adapter's users nothing
    local = next(build_trainer(load_config("shapes", SMALL)).iterations())
    assert remote["reward"] == pytest.approx(local["reward"], abs=0.02)


# ---- what a served reward says of itself and of prompts


class Titled(Reward):
    """Calls itself something, and cannot judge prompts with an ü."""

    title = "plainness of 2026"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return plain(images, prompts)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return [f"prompt {prompt.text!r}, {prompt.metadata}: no" for prompt in prompts if "ü" in prompt.text]


def test_the_server_answers_title_and_check_and_the_client_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROMPTS_PER_CHECK", 2)
    prompts = asked(5)
    with serving(Titled()) as address:
        remote = RemoteReward(urls=address)
        assert call(address, path="/health")[1]["title"] == "plainness of 2026"
        assert remote.title == "plainness of 2026 1 (served)"
        assert remote.check(prompts) == Titled().check(prompts) != []
        assert remote.check([Prompt("a")]) == []
        with serving(remote, version="2") as second:  # a server may serve what another one does
            assert RemoteReward(urls=second).check(prompts) == Titled().check(prompts)


def test_prompts_that_a_served_reward_cannot_judge_are_told_before_the_first_picture() -> None:
    with serving(ShapesReward()) as address:
        chosen = [*SMALL, "rewards=remote", f"rewards.remote.options.urls=[{address}]"]
        config = load_config("shapes", chosen)
        rewards = load_rewards(config.rewards, config.scoring)
        rewards.check(load_prompts("shapes/train"))
        with pytest.raises(UserError, match=r"^reward remote: prompt 'a dog' has no metadata; take its prompts from"):
            rewards.check([Prompt("a dog")])


def test_a_check_goes_to_a_server_that_answers(url: str) -> None:
    with serving(Titled(), version="1") as address:
        remote = RemoteReward(urls=[address])
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
            remote.urls = [nobody, address]
            assert len(remote.check([Prompt("ü")])) == 1
            remote.urls = [nobody]
            with pytest.raises(UserError, match=f"no server answers .{nobody}: ConnectionRefusedError"):
                remote.check([Prompt("ü")])


def test_a_server_by_others_that_has_no_check_finds_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_there(self: RewardServer, request: Request) -> None:
        raise HTTPException(404)

    monkeypatch.setattr(RewardServer, "_check", not_there)
    with serving(Titled()) as address:
        assert call(address, {"prompts": []}, path="/check")[0] == 404
        assert RemoteReward(urls=address).check([Prompt("ü")]) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        ({}, "the body must be an object with prompts"),
        ({"prompts": [], "images": []}, "the body must be an object with prompts"),
        ({"prompts": 3}, "prompts must be a list"),
        ({"prompts": [{"metadata": {}}]}, "prompts[0] must be an object with text"),
    ],
)
def test_a_malformed_check_is_refused(url: str, body: Any, message: str) -> None:
    status, answer = call(url, body, path="/check")
    assert status == 400
    assert message in answer["error"]


def test_a_check_that_fails_is_the_servers_error() -> None:
    class Broken(Titled):
        def check(self, prompts: Sequence[Prompt]) -> list[str]:
            raise KeyError("no\nway")

    with serving(Broken()) as address:
        status, answer = call(address, {"prompts": []}, path="/check")
        assert (status, answer["error"]) == (500, "KeyError: 'no\\nway'")
        with pytest.raises(UserError, match="no server answers .*500, KeyError"):
            RemoteReward(urls=address).check([Prompt("a")])


# ---- servers that fail


OWN = """
import os, time
from pathlib import Path

def sleeping(images, prompts):
    Path(os.environ["MARKER"]).touch()
    time.sleep(600)

def mean(images, prompts):
    return images.mean((1, 2, 3))
"""


@contextmanager
def process(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``dgpo serve-reward`` as users start it; its address."""
    (tmp_path / "own.py").write_text(OWN)
    started = subprocess.Popen(
        [sys.executable, "-m", "dgpo_plugin", "serve-reward", "--port", "0", *arguments],
        cwd=tmp_path,
        env={**os.environ, "MARKER": str(tmp_path / "marker"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs this in the background makes it deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line.startswith("serving own.py:"), line
        yield started, line.split(" at ")[1].split(";")[0]
    finally:
        started.kill()
        started.communicate()


def test_a_server_killed_in_the_middle_is_left_out_and_its_work_done_by_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with process(tmp_path, "own.py:sleeping") as (started, dying):
        name, version = identity_of(f"{tmp_path / 'own.py'}:sleeping")
        assert call(dying, path="/health")[1] == {"name": name, "version": version, "ready": True}

        def kills(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            """The other's reward: only goes on once the first is in the middle of a batch, and dead."""
            while not (tmp_path / "marker").exists():
                time.sleep(0.01)
            started.kill()
            started.wait()
            return plain(images, prompts)

        with served_rewards.serving(kills, version, name=name) as surviving:
            reward = RemoteReward(urls=[dying, surviving], batch_size=2)
            assert torch.equal(reward(pictures(6), asked(6)), plain(pictures(6), asked(6)))
            warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            assert [text for text in warnings if "left out" in text and dying in text]
            assert len(warnings) == 1
            assert torch.equal(reward(pictures(6), asked(6)), plain(pictures(6), asked(6)))  # without the dead one
        with pytest.raises(UserError, match="no server is left") as error:
            reward(pictures(6), asked(6))
        assert dying in str(error.value)
        assert surviving in str(error.value)
        assert "ConnectionRefusedError" in str(error.value)


def test_a_server_that_hangs_is_left_out() -> None:
    release = threading.Event()

    def hangs(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        release.wait(60)
        return plain(images, prompts)

    with serving(hangs) as hanging, serving() as good:
        found = RemoteReward(urls=[hanging, good], batch_size=2, timeout=0.5)(pictures(6), asked(6))
        assert torch.equal(found, plain(pictures(6), asked(6)))
        with pytest.raises(UserError, match=r"no server is left \(http.*: no answer in 0.5 s\)"):
            RemoteReward(urls=hanging, timeout=0.5)(pictures(1), asked(1))
        release.set()


def test_a_server_that_comes_back_is_used_again(caplog: pytest.LogCaptureFixture) -> None:
    used: list[str] = []

    def noting(name: str) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
        def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            used.append(name)
            return plain(images, prompts)

        return reward

    def calls(until: str) -> None:
        for _ in range(50):
            assert torch.equal(reward(pictures(4), asked(4)), plain(pictures(4), asked(4)))
            if until in used:
                break

    with serving() as steady:
        with serving() as going:
            port = int(going.rpartition(":")[2])
            reward = RemoteReward(urls=[going, steady], batch_size=1)
        calls("")
        assert f"{going} is left out" in caplog.text
        with serving(noting("another version"), version="2", port=port):
            calls("")
        assert f"{going} is back" not in caplog.text
        with serving(noting("the same"), port=port):
            calls("the same")
        assert f"{going} is back" in caplog.text
    assert set(used) == {"the same"}


def test_a_server_restarted_with_another_version_scores_nothing() -> None:
    """No request failed in between, so nobody asked for its health."""
    calls: list[int] = []

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(images))
        return plain(images, prompts)

    with serving(counted) as address:
        remote = RemoteReward(urls=address)
        remote(pictures(2), asked(2))
    with serving(counted, version="2", port=int(address.rpartition(":")[2])), pytest.raises(UserError) as refused:
        remote(pictures(2), asked(2))
    assert "serves plain 2, " in str(refused.value)
    with serving(counted, port=int(address.rpartition(":")[2])):
        assert len(remote(pictures(2), asked(2))) == 2


def test_a_single_server_is_asked_once_more() -> None:
    calls = []

    def stumbles(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no room")
        return plain(images, prompts)

    with serving(stumbles) as address:
        assert torch.equal(RemoteReward(urls=address)(pictures(3), asked(3)), plain(pictures(3), asked(3)))
    assert len(calls) == 2


def test_a_reward_that_always_fails_ends_it() -> None:
    def fails(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise KeyError("never\nmind")

    with (
        serving(fails) as address,
        pytest.raises(UserError, match=r"no server is left .*500, KeyError: 'never") as error,
    ):
        RemoteReward(urls=address)(pictures(1), asked(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda images, prompts: images.mean((1, 2, 3)) * float("nan"),
            "422, reward plain: 2 of 2 values are not finite",
        ),
        (lambda images, prompts: images.mean(), r"422, reward plain: returned shape \(\) for 2 images"),
    ],
)
def test_a_reward_that_answers_nonsense_is_told_and_not_asked_elsewhere(reward: Any, message: str) -> None:
    calls: list[int] = []

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(1)
        return reward(images, prompts)

    with serving(counted) as first, serving(counted) as second, pytest.raises(UserError, match=message):
        RemoteReward(urls=[first, second], batch_size=2)(pictures(2), asked(2))
    assert len(calls) == 1


SERVES = {"name": "n", "version": "1"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({**SERVES, "rewards": [1.0]}, "an answer without 2 rewards"),
        ({**SERVES, "rewards": [1.0, None]}, "an answer without 2 rewards"),
        ({**SERVES, "rewards": [1.0, True]}, "an answer without 2 rewards"),
        ({**SERVES, "rewards": [1.0, float("nan")]}, "an answer without 2 rewards"),
        (SERVES, "an answer without 2 rewards"),
        ([], "now serves None None, before n 1"),
        ({"rewards": [1.0, 1.0]}, "now serves None None, before n 1"),
        ({**SERVES, "version": "2", "rewards": [1.0, 1.0]}, "now serves n 2, before n 1; start it as it was"),
        (b"<html>", "an answer that is not JSON: <html>"),
    ],
)
def test_an_answer_that_is_none(answer: Any, message: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answer if self.command == "POST" else {**SERVES, "ready": True}
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        reward = RemoteReward(urls=f"http://127.0.0.1:{made.server_address[1]}")
        with pytest.raises(UserError, match=message):
            reward(pictures(2), asked(2))
        made.shutdown()


# ---- the start


def test_servers_must_be_well_and_serve_the_same(url: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{nobody} is not well .*ConnectionRefusedError.*start its servers first"):
            load_reward("remote", RewardTerm(options={"urls": [url, nobody]}))
    with serving(version="2") as other, pytest.raises(UserError, match=f"{other} serves plain 2, others plain 1"):
        RemoteReward(urls=[url, other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option urls: is empty"),
        ({"urls": "127.0.0.1:8000"}, "'127.0.0.1:8000' is no address; write it as http://host:port"),
        ({"urls": "file:///etc/passwd"}, "is no address"),
        ({"urls": "http://user:secret@host"}, "is no address"),
        ({"urls": "http://host:port"}, "is no address"),
        ({"urls": ["http://a", "http://a/"]}, "the same address twice"),
        ({"urls": "http://a", "batch_size": 0}, "batch_size must be at least 1"),
        ({"urls": "http://a", "token_variable": "NOT_SET_HERE"}, "environment variable NOT_SET_HERE is not set"),
        ({"url": "http://a"}, "remote: has no option 'url'; did you mean 'urls'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("remote", RewardTerm(options=options))


# ---- tokens


def test_without_the_token_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"images": [as_png(pictures(1)[0])], "prompts": [{"text": "a"}]}
    with serving(token="right") as address:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Bearer é"},
        ):
            assert call(address, body, **headers) == (401, {"error": "the token is missing or wrong"})
            assert call(address, path="/health", **headers)[0] == 401
            assert call(address, path="/nothing", **headers)[0] == 401
        assert call(address, body, Authorization="Bearer right")[0] == 200
        monkeypatch.setenv("REWARD_TOKEN", "right")
        found = RemoteReward(urls=address, token_variable="REWARD_TOKEN")(pictures(2), asked(2))
        assert torch.equal(found, plain(pictures(2), asked(2)))
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(UserError, match="is not well .401, the token is missing or wrong"):
            RemoteReward(urls=address, token_variable="REWARD_TOKEN")
        monkeypatch.setenv("REWARD_TOKEN", "two\nlines")
        with pytest.raises(UserError, match="may hold letters, digits and signs only"):
            RemoteReward(urls=address, token_variable="REWARD_TOKEN")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org"])
def test_others_may_not_reach_it_without_a_token(host: str) -> None:
    with pytest.raises(UserError, match="others can reach it, so it needs a token"):
        RewardServer(as_reward(plain), ("plain", "1"), address=(host, 0))


def test_which_addresses_are_this_machines() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    with serving(host="0.0.0.0", token="t") as address:
        assert call(address, path="/health", Authorization="Bearer t")[0] == 200


# ---- requests that are not served


def good() -> dict[str, Any]:
    return {
        "images": [as_png(image) for image in pictures(2)],
        "prompts": [{"text": "a"}, {"text": "b", "metadata": {}}],
    }


def png(width: int, height: int, data: bytes) -> str:
    """A PNG whose head claims a size, whatever its data are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def jpeg() -> str:
    out = io.BytesIO()
    Image.new("RGB", (5, 6)).save(out, format="JPEG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"no json", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[]", 400, "must be an object with images and prompts"),
        ({"images": []}, 400, "must be an object with images and prompts"),
        (good() | {"more": 1}, 400, "must be an object with images and prompts"),
        ({"images": [], "prompts": []}, 400, "lists of the same length, at least 1"),
        (good() | {"prompts": [{"text": "a"}]}, 400, "lists of the same length, at least 1"),
        (good() | {"prompts": "ab"}, 400, "lists of the same length, at least 1"),
        (good() | {"prompts": [{"text": "a"}, {"metadata": {}}]}, 400, "prompts[1] must be an object with text"),
        (good() | {"prompts": [{"text": "a"}, {"text": 1}]}, 400, "prompts[1]: text must be a string"),
        (good() | {"prompts": [{"text": "a", "metadata": []}] * 2}, 400, "prompts[0]: text must be a string"),
        (good() | {"images": [1, 2]}, 400, "images[0] must be a string"),
        (good() | {"images": ["?", "?"]}, 400, "images[0] is not base64"),
        (good() | {"images": ["é", "é"]}, 400, "images[0] is not base64"),
        (good() | {"images": ["", ""]}, 400, "images[0] is not a PNG"),
        (good() | {"images": [jpeg()] * 2}, 400, "images[0] is not a PNG"),
        (good() | {"images": [good()["images"][0], good()["images"][0][:80]]}, 400, "images[1] is a broken PNG"),
        (good() | {"images": [good()["images"][0], png(4, 4, b"")]}, 400, "images[1] is (4, 4), images[0] (5, 6)"),
        # Their data are no picture: decoding them would be a broken PNG instead.
        (good() | {"images": [png(60_000, 60_000, b"x")] * 2}, 413, "images[0] has too many pixels"),
        (good() | {"images": [png(8192, 8193, b"x")] * 2}, 413, "2 pictures of 8192 x 8193: more than 67108864 pixels"),
        (good() | {"images": [png(6000, 6000, b"x")] * 2}, 413, "2 pictures of 6000 x 6000: more than 67108864 pixels"),
        ({"images": [""] * 257, "prompts": [{"text": "a"}] * 257}, 413, "257 pictures, of 256 allowed"),
    ],
)
def test_what_is_not_scored(url: str, body: Any, status: int, message: str) -> None:
    found, answer = call(url, body)
    assert found == status
    assert answer.keys() == {"error"}
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert call(url, good())[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/health/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/score", 405),
        ("POST", "/health", 405),
        ("DELETE", "/score", 405),
        ("OPTIONS", "/score", 405),
        ("BREW", "/score", 405),
    ],
)
def test_paths_and_methods(url: str, method: str, path: str, status: int) -> None:
    found, answer = call(url, b"{}" if method == "POST" else None, method, path)
    assert (found, answer.keys()) == (status, {"error"})


def test_a_body_that_is_too_large_is_refused_with_a_reason_that_arrives() -> None:
    with serving(most_bytes=1000) as address:
        assert call(address, b"x" * 5_000_000)[0] == 413
        with pytest.raises(UserError, match="413, the body has .* bytes, of 1000 allowed; send fewer pictures"):
            RemoteReward(urls=address)(torch.rand(4, 3, 64, 64), asked(4))


def raw(address: str, request: bytes) -> bytes:
    """What comes back for bytes that no client library would send."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("", b"411"),
        ("Transfer-Encoding: chunked\r\n", b"411"),
        ("Content-Length: -1\r\n", b"400"),
        ("Content-Length: 1_0\r\n", b"400"),
        ("Content-Length: 1\r\nContent-Length: 2\r\n", b"400"),
        ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", b"411"),
        ("Content-Length: " + "9" * 5000 + "\r\n", b"400"),
        ("Content-Length: 99999999999999\r\n", b"413"),
        ("X: y\r\n" * 30_000, b"431"),
        ("X\x00: y\r\n", b"400"),
    ],
)
def test_heads_that_are_refused(url: str, lines: str, status: bytes) -> None:
    answer = raw(url, f"POST /score HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
    assert answer.split(b" ")[1] == status
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2]).keys() == {"error"}


def test_a_body_that_does_not_come_is_not_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    answer = raw(url, b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
    assert b" 408 " in answer
    assert raw(url, b"") == b""
    assert raw(url, b"POST /score HT") == b""


@pytest.mark.parametrize(
    "start", [b"GET /health HTTP/1.1\r\nX: ", b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n"]
)
def test_a_request_that_comes_in_drops_is_cut_off(url: str, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte every now and then keeps no connection: it must be whole in a given time."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.4)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=0.05) as connection:
        connection.sendall(start)
        for _ in range(2000):
            try:
                connection.sendall(b"x")
                connection.recv(65536)
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was never cut off")
    assert call(url, path="/health")[0] == 200


def test_the_oldest_connection_without_a_request_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 2)
    with serving() as address:
        host, port = address.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=60) for _ in range(2)]
        idle.append(socket.create_connection((host, int(port)), timeout=60))
        assert idle[0].recv(1) == b""
        idle[1].sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert idle[1].recv(12) == b"HTTP/1.1 200"
        for connection in idle:
            connection.close()
        assert [call(address, good())[0] for _ in range(6)] == [200] * 6


def test_one_request_scores_at_a_time_and_health_answers_meanwhile() -> None:
    busy, most, scoring, go_on = [], [], threading.Event(), threading.Event()

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        busy.append(1)
        most.append(len(busy))
        scoring.set()
        go_on.wait(60)
        time.sleep(0.02)
        busy.pop()
        return plain(images, prompts)

    with serving(counted) as address:
        threads = [threading.Thread(target=call, args=(address, good())) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert scoring.wait(60)
        assert call(address, path="/health") == (200, {"name": "plain", "version": "1", "ready": True})
        go_on.set()
        for thread in threads:
            thread.join()
    assert most == [1] * 4


# ---- the command


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    with process(tmp_path, "own.py:mean") as (started, address):
        found = RemoteReward(urls=address)(pictures(3), asked(3))
        assert torch.allclose(found, pictures(3).mean((1, 2, 3)))
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (130, "stopped; the requests in flight were answered\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it, so it needs a token"),
        (["shapes", "--token-variable", "NOT_SET_HERE"], "environment variable NOT_SET_HERE is not set"),
        (["nothing"], "no reward 'nothing'"),
        (["shapes", "--set", "batch=3"], "--set: unknown key batch; did you mean 'batch_size'"),
        (["shapes", "--set", "options.colour=3"], "shapes: has no option 'colour'"),
        (["shapes", "--port", "{taken}"], "choose another"),
    ],
)
def test_what_is_not_served(url: str, arguments: list[str], message: str) -> None:
    taken = url.rpartition(":")[2]
    result = CliRunner().invoke(main, ["serve-reward", *(part.format(taken=taken) for part in arguments)])
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_the_version_changes_with_what_changes_the_rewards(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "own.py", tmp_path / "b" / "own.py"
    for file in (one, other):
        file.parent.mkdir()
        file.write_text(OWN)
    same = identity_of(f"{one}:mean", "batch_size=3", "device=cpu")
    assert same == identity_of(f"{other}:mean")
    assert same[0] == "own.py:mean"
    other.write_text(OWN + "\n")
    different = [identity_of(f"{other}:mean"), identity_of(f"{one}:mean", "precision=bf16")]
    different += [identity_of(f"{one}:mean", "options.weights=/x")]
    assert len({version for _, version in different} | {same[1]}) == 4


def test_the_version_changes_with_the_package_a_reward_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = set()
    for version in ("1.0", "1.1"):
        folder = tmp_path / version / f"others_rewards-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: others-rewards\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text("[dgpo_plugin.rewards]\ntheirs = package:reward\n")
        with monkeypatch.context() as path:
            path.syspath_prepend(folder.parent)
            assert REWARDS.get("theirs").package == "others-rewards"
            versions.add(identity_of("theirs")[1])
    assert len(versions) == 2


def test_serving_ones_own_needs_little() -> None:
    """An environment made for another scorer need not have what training needs."""
    heavy = [
        "accelerate",
        "diffusers",
        "httpx2",
        "jinja2",
        "matplotlib",
        "peft",
        "safetensors",
        "scipy",
        "tokenizers",
        "transformers",
    ]
    imports = "import sys, dgpo_plugin.commands.main, dgpo_plugin.rewards.served.server"
    code = f"{imports}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the documentation's example


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """Its file, with a stand-in for the model that checks how it is loaded and what it is given."""
    text = (Path(__file__).parents[4] / "docs" / "rewards-remote.md").read_text(encoding="utf-8")
    (tmp_path / "deqa.py").write_text(text.split("```python\n")[1].split("```")[0])
    (tmp_path / "transformers.py").write_text(
        "import torch\n"
        "class AutoModelForCausalLM:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, name, *, trust_remote_code, attn_implementation, torch_dtype, device_map):\n"
        "        assert name == 'zhiyuanyou/DeQA-Score-Mix3' and trust_remote_code\n"
        "        return cls()\n"
        "    def score(self, pictures):\n"
        "        return torch.tensor([p.getpixel((1, 2))[0] / 255 for p in pictures], dtype=torch.float16)\n"
    )
    code = (
        "import torch\n"
        "from dgpo_plugin.common.prompt import Prompt\n"
        "from dgpo_plugin.rewards import checked_rewards, load_reward\n"
        "images = torch.zeros(2, 3, 4, 5)\n"
        "images[1, 0, 2, 1] = 1\n"
        "reward = load_reward('deqa.py:DeQA')\n"
        "print(checked_rewards(reward, images, [Prompt('a')] * 2, 'deqa').tolist())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[0.0, 1.0]", done.stderr
