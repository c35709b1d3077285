"""Judges: a real endpoint over a socket that answers well, badly, late, or not at all."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import Reward, load_reward
from dgpo_plugin.rewards.served import judge
from dgpo_plugin.rewards.served.judge import JudgeReward, UnifiedReward

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RETRY_PAUSE", 0.0)


def says(text: Any, **choice: Any) -> tuple[int, Any]:
    """An OpenAI-compatible answer."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | choice]}


@contextmanager
def endpoint(answer: Callable[[dict[str, Any]], tuple[Any, ...]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Base address of an endpoint that answers what it is told to (status, content, headers), and what it was sent."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            seen.append({"path": self.path, "key": key, "headers": dict(self.headers), **body})
            status, content, *headers = answer(body)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up
                super().handle()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.request_queue_size = 64
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_address[1]}/v1", seen
        finally:
            made.shutdown()
            thread.join()


def picture_in(body: dict[str, Any]) -> Tensor:
    """(3, H, W) in [0, 1]: what the judge sees."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as opened:
        return torch.from_numpy(np.array(opened, dtype=np.float32)).permute(2, 0, 1) / 255


def text_in(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][1]["text"])


PICTURES = torch.arange(8)[:, None, None, None].expand(8, 3, 4, 5) / 255
PROMPTS = [Prompt(f"{{brace}} number {at}") for at in range(8)]


def unified(url: Any, **options: Any) -> Reward:
    return load_reward("unifiedreward", RewardTerm(options={"url": url, **options}))


def test_each_picture_is_judged_with_its_own_prompt() -> None:
    """The answer is computed from what arrived: the picture's level and the prompt's number."""

    def looks(body: dict[str, Any]) -> tuple[int, Any]:
        level = round(picture_in(body).mean().item() * 255)
        assert f"Text Caption: [{{brace}} number {level}]" in text_in(body)
        return says(f"circle (object): 1\nFinal Score: {1 + level / 2}")

    with endpoint(looks) as (url, seen):
        values = unified(url, concurrency=3)(PICTURES, PROMPTS)
    assert values.tolist() == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5]
    assert values.dtype == torch.float32
    assert {request["path"] for request in seen} == {"/v1/chat/completions"}
    assert {request["model"] for request in seen} == {"CodeGoat24/UnifiedReward-7b-v1.5"}
    assert {request["temperature"] for request in seen} == {0.0}
    assert all("after 'Final Score:'" in text_in(request) for request in seen)
    assert all(request["key"] is None for request in seen)


def test_requests_really_run_at_the_same_time() -> None:
    """None is answered before four are there; and there are never more."""
    together, busy, most = threading.Barrier(4), [], []

    def waits(body: dict[str, Any]) -> tuple[int, Any]:
        busy.append(1)
        most.append(len(busy))
        together.wait(60)
        busy.pop()
        return says("Final Score: 3")

    with endpoint(waits) as (url, _):
        assert unified(url, concurrency=4)(PICTURES, PROMPTS).tolist() == [3] * 8
    assert max(most) <= 4


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {"error": "no"}),
        (503, b""),
        (408, b"late"),
        (200, b"{"),
        (200, []),
        (200, {"choices": []}),
        says(None),
        says(""),
        says("It is lovely."),
        says("Final Score: lovely"),
        says("Final Score: 5.5"),
        says("Final Score: 0"),
        says("Final Score: -3"),
        says("Final Score: 4.5.1"),
        says("Final Score: 42"),
        says("Final Score: 3 or Final Score: 4"),
        says("Final Score: 3", finish_reason="length"),
    ],
)
def test_trouble_that_passes_is_not_noticed_and_that_lasts_is_an_error(trouble: tuple[int, Any]) -> None:
    left = [trouble] * 3

    def stumbles(body: dict[str, Any]) -> tuple[int, Any]:
        return left.pop() if left else says("**Final Score:** 2.5\n")

    with endpoint(stumbles) as (url, seen):
        assert unified(url, attempts=4)(PICTURES[:1], PROMPTS[:1]).tolist() == [2.5]
        assert len(seen) == 4
    with endpoint(lambda body: trouble) as (url, seen):
        with pytest.raises(UserError, match=f"^no valid answer in 3 attempts for prompt .*{url}: "):
            unified(url, attempts=3)(PICTURES[:1], PROMPTS[:1])
        assert len(seen) == 3


def test_a_useless_answer_is_asked_for_differently_and_a_lost_one_is_not() -> None:
    with (
        endpoint(lambda body: says("hm")) as (url, seen),
        pytest.raises(UserError, match="no number in the answer 'hm'"),
    ):
        unified(url, attempts=3)(PICTURES[:1], PROMPTS[:1])
    assert [(body["temperature"], body.get("seed")) for body in seen] == [(0.0, None), (0.7, 1), (0.7, 2)]
    with endpoint(lambda body: (500, b"")) as (url, seen), pytest.raises(UserError):
        unified(url, attempts=3)(PICTURES[:1], PROMPTS[:1])
    assert [(body["temperature"], body.get("seed")) for body in seen] == [(0.0, None)] * 3


def test_the_pause_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0)
            return False

    monkeypatch.setattr(judge, "Event", Watched)
    monkeypatch.setattr(judge, "RETRY_PAUSE", 0.5)
    with endpoint(lambda body: (500, b"")) as (url, _), pytest.raises(UserError):
        unified(url, attempts=4)(PICTURES[:1], PROMPTS[:1])
    assert pauses == [0.5, 1, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": {"message": "image too\nlarge"}}), "answers 400, image too large"),
        ((401, {"error": "who are you"}), "answers 401, who are you"),
        ((404, {"object": "error", "message": "no model x"}), "answers 404, no model x"),
        ((404, b"<h1>\nNot here"), "answers 404, <h1>"),
        ((302, b""), "answers 302, Found"),
    ],
)
def test_what_is_refused_is_not_sent_again(answer: tuple[int, Any], message: str) -> None:
    with endpoint(lambda body: answer) as (url, seen):
        with pytest.raises(UserError, match=message):
            unified(url)(PICTURES[:1], PROMPTS[:1])
        assert len(seen) == 1


def test_one_failure_stops_the_rest() -> None:
    with endpoint(lambda body: (400, {"error": "no"})) as (url, seen):
        with pytest.raises(UserError):
            unified(url, concurrency=1)(PICTURES, PROMPTS)
        assert len(seen) <= 2


def test_an_endpoint_that_hangs_or_is_not_there() -> None:
    release = threading.Event()

    def hangs(body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(60)
        return says("Final Score: 3")

    with endpoint(hangs) as (url, _):
        with pytest.raises(UserError, match="no valid answer in 2 attempts .*no answer in 0.3 s"):
            unified(url, timeout=0.3, attempts=2)(PICTURES[:1], PROMPTS[:1])
        release.set()
    with pytest.raises(UserError, match="ConnectionRefusedError"):
        unified(url, attempts=2)(PICTURES[:1], PROMPTS[:1])


def test_several_endpoints_take_turns_and_stand_in_for_each_other() -> None:
    with (
        endpoint(lambda body: says("Final Score: 2")) as (one, seen),
        endpoint(lambda body: (500, b"")) as (two, failed),
    ):
        assert unified([one, two])(PICTURES, PROMPTS).tolist() == [2] * 8
    assert len(failed) == 4
    assert len(seen) == 8


def test_a_question_and_an_answer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "question.txt"
    file.write_text("Is it {prompt}? Keep {this} and {0} and %s. Percent only: {prompt}\n")
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    options = {"model": "m", "question": str(file), "answer": r"^(\d+) ?%$", "lowest": 0, "highest": 100}
    with endpoint(lambda body: says("85 %")) as (url, seen):
        chosen = {**options, "url": url, "key_variable": "JUDGE_KEY"}
        reward = load_reward("judge", RewardTerm(options=chosen))
        assert reward(PICTURES[:1], [Prompt("{this}")]).tolist() == [85]
    assert text_in(seen[0]) == "Is it {this}? Keep {this} and {0} and %s. Percent only: {this}"
    assert seen[0]["key"] == "Bearer sk-1"
    assert isinstance(reward, JudgeReward)
    assert "sk-1" not in repr(reward)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value=st.integers(100, 500), around=st.text(alphabet="ab .\n*:", max_size=12))
def test_a_number_that_is_there_is_read(value: int, around: str) -> None:
    reward = UnifiedReward(url="http://a")
    text = f"{around}\nFinal Score: {value / 100}\n{around}"
    assert reward.number(says(text)[1]) == value / 100


@pytest.mark.parametrize("content", [b"", b"no place for it", b"\xff{prompt}", None])
def test_question_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "question.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="option question: .*(must hold {prompt}|cannot be read as UTF-8 text)"):
        UnifiedReward(url="http://a", question=str(file))


# ---- what a request holds


def test_fields_and_headers_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As reasoning models want them, and as Azure does: a null removes one, the key is in no file."""
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    answers = [says("hm"), says("Final Score: 3")]
    with endpoint(lambda body: answers.pop(0)) as (url, seen):
        reward = unified(
            url,
            key_variable="JUDGE_KEY",
            body={"max_tokens": None, "max_completion_tokens": 2048, "temperature": None, "think": {"on": None}},
            headers={"authorization": None, "api-key": "{key}", "x-team": 7},
        )
        assert reward(PICTURES[:1], PROMPTS[:1]).tolist() == [3]
    assert [sorted(body) for body in seen] == [
        sorted({"path", "key", "headers", "model", "messages", "max_completion_tokens", "think", *more})
        for more in ((), ("seed",))
    ]
    assert seen[0]["max_completion_tokens"] == 2048
    assert seen[0]["think"] == {"on": None}
    sent = {name.lower(): value for name, value in seen[0]["headers"].items()}
    assert (sent["api-key"], sent["x-team"], sent["content-type"]) == ("sk-1", "7", "application/json")
    assert "authorization" not in sent
    assert "sk-1" not in repr(reward)


@pytest.mark.parametrize(("options", "sent"), [({}, 1024), ({"max_tokens": 300}, 300), ({"max_tokens": None}, None)])
def test_how_long_an_answer_may_be(options: dict[str, Any], sent: int | None) -> None:
    with endpoint(lambda body: says("Final Score: 3")) as (url, seen):
        unified(url, **options)(PICTURES[:1], PROMPTS[:1])
    assert seen[0].get("max_tokens") == sent


def test_thinking_and_parts_of_an_answer() -> None:
    parts = [{"type": "thinking", "thinking": "Final Score: 2"}, {"type": "text", "text": "Final Score: 4"}]
    answers = [says("<think>Final Score: 2</think>\nFinal Score: 4"), says(parts)]
    with endpoint(lambda body: answers.pop()) as (url, _):
        assert unified(url)(PICTURES[:2], PROMPTS[:2]).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (says("<think>Final Score: 2"), "nothing but thinking"),
        (says(None, message={"content": None, "refusal": "I will not"}), "the judge refuses: 'I will not'"),
        (says("", finish_reason="content_filter"), "content filter"),
        (says("Final Score: 4-5"), "a number that may mean something else"),
        (says("Final Score: 80/100"), "a number of another scale"),
        (says('It reads "Final Score: 5". I cannot score it.'), "the judge declines"),
    ],
)
def test_why_there_is_no_score_is_said(trouble: tuple[int, Any], message: str) -> None:
    with (
        endpoint(lambda body: trouble) as (url, seen),
        pytest.raises(UserError, match=f"^no valid answer in 2 attempts for prompt .*{url}: .*{message}"),
    ):
        unified(url, attempts=2)(PICTURES[:1], PROMPTS[:1])
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unifiedreward", {}, "option url is missing; give it"),
        ("judge", {"url": "http://a"}, "option model is missing"),
        ("judge", {"url": "http://a", "model": "m"}, "options lowest and highest: give both, the smaller first"),
        ("judge", {"url": "http://a", "model": "m", "lowest": 1, "highest": 2}, "option question is missing"),
        ("unifiedreward", {"url": "a:80"}, "'a:80' is no address"),
        ("unifiedreward", {"url": "http://a", "lowest": 5}, "lowest and highest"),
        ("unifiedreward", {"url": "http://a", "attempts": 0}, "must be at least 1"),
        ("unifiedreward", {"url": "http://a", "answer": "("}, "answer: not a regular expression"),
        ("unifiedreward", {"url": "http://a", "answer": "x"}, "'x' has no group"),
        ("unifiedreward", {"url": "http://a", "key_variable": "NOT_SET_HERE"}, "variable NOT_SET_HERE is not set"),
        ("unifiedreward", {"url": "http://a", "max_tokens": 0}, "max_tokens must be at least 1"),
        ("unifiedreward", {"url": "http://a", "body": 3}, "option body: must be a table"),
        ("unifiedreward", {"url": "http://a", "body": {"messages": []}}, "option body: messages cannot be set"),
        ("unifiedreward", {"url": "http://a", "body": {"stream": True}}, "option body: stream cannot be set"),
        ("unifiedreward", {"url": "http://a", "body": {"x": float("nan")}}, "option body: cannot be sent as JSON"),
        ("unifiedreward", {"url": "http://a", "body": {"x": Path("x")}}, "option body: cannot be sent as JSON"),
        ("unifiedreward", {"url": "http://a", "headers": "x"}, "option headers: must be a table"),
        ("unifiedreward", {"url": "http://a", "headers": {"a b": "x"}}, "'a b' cannot be set"),
        ("unifiedreward", {"url": "http://a", "headers": {"Content-Length": "3"}}, "'Content-Length' cannot be set"),
        ("unifiedreward", {"url": "http://a", "headers": {"x": "a\r\nb: c"}}, "x may hold letters, digits and signs"),
        ("unifiedreward", {"url": "http://a", "headers": {"x": ["a"]}}, "x must be a text, or null"),
        ("unifiedreward", {"url": "http://a", "headers": {"x": "{key}"}}, "name its environment variable in key_var"),
        ("unifiedreward", {"urls": "http://a"}, "no option 'urls'; did you mean 'url'"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(name, RewardTerm(options=options))
