"""Endpoints that are busy: left alone for as long as they ask, by all pictures, once."""

from __future__ import annotations

import threading
from email.utils import formatdate
from typing import Any

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.rewards.served import judge
from dgpo_plugin.rewards.served.endpoint import JITTER, LONGEST_PAUSE, Endpoint
from dgpo_plugin.rewards.served.http_client import RequestFailed, seconds_to_wait
from tests.dgpo_plugin.rewards.served.test_judge import PICTURES, PROMPTS, endpoint, says, unified

pytestmark = pytest.mark.fast

NOW = 1_700_000_000.0


class Clock:
    """A time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now


class Sleeps(threading.Event):
    """An event whose waiting only moves the clock."""

    clock: Clock

    def wait(self, timeout: float | None = None) -> bool:
        self.clock.slept.append(timeout or 0)
        self.clock.now += timeout or 0
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Judges whose endpoints live by a clock of their own."""
    made = Clock()
    monkeypatch.setattr(Sleeps, "clock", made, raising=False)
    monkeypatch.setattr(judge, "Event", Sleeps)
    monkeypatch.setattr(judge, "Endpoint", lambda url, pause: Endpoint(url, pause, made))
    return made


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0),
        ({"retry-after": "Friday, 31-Dec-99 23:59:59 GMT"}, 0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert seconds_to_wait(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("error", "busy", "temporary"),
    [
        (RequestFailed(429, "slow down"), True, True),
        (RequestFailed(529, "overloaded"), True, True),
        (RequestFailed(503, "Loading model"), True, True),
        (RequestFailed(503, "Model x is currently loading"), True, True),
        (RequestFailed(503, "warming up"), True, True),
        (RequestFailed(503, "", retry_after=3.0), True, True),
        (RequestFailed(503, "no healthy upstream"), False, True),
        (RequestFailed(500, "Loading model"), False, True),
        (RequestFailed(429, "You exceeded your quota", code="insufficient_quota"), False, False),
        (RequestFailed(401, "no"), False, False),
        (RequestFailed(None, "no answer in 3 s"), False, True),
    ],
)
def test_who_is_busy(error: RequestFailed, busy: bool, temporary: bool) -> None:
    assert (error.busy, error.temporary) == (busy, temporary)


def test_a_pause_is_one_for_all_that_were_under_way_and_doubles_after_that() -> None:
    clock = Clock()
    server = Endpoint("http://a", 1.0, clock)
    sent = clock()
    assert [server.leave_alone(sent, None) for _ in range(16)] == [1.0] * 16
    clock.now += 1
    assert server.free_in() == 0
    assert [server.leave_alone(clock(), None), server.leave_alone(clock() - 0.5, None)] == [2.0, 2.0]
    clock.now += 2
    server.answered()
    assert server.leave_alone(clock(), None) == 1.0


def test_what_is_asked_for_is_given_up_to_a_bound() -> None:
    clock = Clock()
    server = Endpoint("http://a", 1.0, clock)
    assert server.leave_alone(clock(), 7.0) == 7
    assert server.leave_alone(clock() - 1, 5.0) == 7  # never shorter
    assert server.leave_alone(clock() - 1, 3600.0) == LONGEST_PAUSE
    clock.now += LONGEST_PAUSE
    for _ in range(30):
        clock.now += server.leave_alone(clock(), None)
    assert server.leave_alone(clock(), None) == LONGEST_PAUSE


def test_those_who_waited_do_not_come_back_together() -> None:
    clock = Clock()
    Sleeps.clock = clock
    server, ends = Endpoint("http://a", 1.0, clock), set()
    for _ in range(8):
        server.leave_alone(clock(), 10.0)
        began = clock()
        assert server.wait(Sleeps())
        ends.add(clock() - began)
    assert len(ends) == 8
    assert min(ends) >= 10
    assert max(ends) <= 10 * (1 + JITTER)
    stopped = Sleeps()
    stopped.set()
    assert not server.wait(stopped)


@pytest.mark.parametrize(
    "busy",
    [
        (429, {"error": {"message": "slow down"}}, ("Retry-After", "7")),
        (503, {"error": {"message": "Loading model"}}, ("retry-after-ms", "7000")),
        (529, b"", ("Retry-After", "7")),
    ],
)
def test_a_busy_endpoint_costs_no_attempt(clock: Clock, busy: tuple[Any, ...]) -> None:
    left = [busy] * 5

    def recovers(body: dict[str, Any]) -> tuple[Any, ...]:
        return left.pop() if left else says("Final Score: 3")

    with endpoint(recovers) as (url, seen):
        assert unified(url, attempts=1)(PICTURES[:1], PROMPTS[:1]).tolist() == [3]
    assert len(seen) == 6
    assert len(clock.slept) == 5
    assert all(7 <= seconds <= 7 * (1 + JITTER) for seconds in clock.slept)
    assert {(body["temperature"], body.get("seed")) for body in seen} == {(0.0, None)}


def test_all_pictures_wait_once(clock: Clock) -> None:
    """Four are under way when the first is told to wait: then one pause, and no request within it."""
    together = threading.Barrier(4)
    times: list[float] = []

    def slows(body: dict[str, Any]) -> tuple[Any, ...]:
        times.append(clock())
        if len(times) <= 4:
            together.wait(60)
            return 429, b"", ("Retry-After", "30")
        return says("Final Score: 3")

    with endpoint(slows) as (url, _):
        assert unified(url, concurrency=4, attempts=1)(PICTURES, PROMPTS).tolist() == [3] * 8
    assert len(times) == 12
    assert times[:4] == [100.0] * 4
    assert min(times[4:]) >= 130


def test_a_busy_endpoint_is_stood_in_for(clock: Clock) -> None:
    with (
        endpoint(lambda body: (429, b"", ("Retry-After", "30"))) as (one, busy),
        endpoint(lambda body: says("Final Score: 2")) as (two, seen),
    ):
        assert unified([one, two], concurrency=1, attempts=1)(PICTURES, PROMPTS).tolist() == [2] * 8
    assert (len(busy), len(seen)) == (1, 8)
    assert clock.slept == []


def test_patience_has_an_end(clock: Clock) -> None:
    with (
        endpoint(lambda body: (429, {"error": {"message": "daily limit"}}, ("Retry-After", "86400"))) as (url, seen),
        pytest.raises(UserError, match=f"^busy for 600 s, last {url}: 429, daily limit; try again later"),
    ):
        unified(url)(PICTURES[:1], PROMPTS[:1])
    assert len(seen) == 11
    assert sum(clock.slept) >= 10 * LONGEST_PAUSE


def test_a_quota_that_is_used_up_is_not_waited_for(clock: Clock) -> None:
    answer = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with (
        endpoint(lambda body: (429, answer)) as (url, seen),
        pytest.raises(UserError, match="answers 429, You exceeded your current quota"),
    ):
        unified(url)(PICTURES[:1], PROMPTS[:1])
    assert len(seen) == 1
