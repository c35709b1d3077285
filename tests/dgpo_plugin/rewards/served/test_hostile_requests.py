"""A share of the campaign's hostile requests, and that the campaign would find what it looks for."""

from __future__ import annotations

import pytest

from dgpo_plugin.rewards.served.request_body import Refusal, read_check_request
from tests.fuzz import requests

pytestmark = pytest.mark.fast


def test_hostile_requests_are_answered_in_one_line_and_the_server_lives() -> None:
    for number, case in enumerate(requests.cases(0, 150)):
        try:
            requests.run(case)
        except Exception as error:
            raise AssertionError(f"case {number} ({case.kind}), {case.data[:300]!r}: {error}") from error


def test_half_of_a_character_in_a_prompt_is_the_clients_mistake() -> None:
    """Found by the campaign: it was answered as a fault of the server, which the client tries again."""
    with pytest.raises(Refusal, match=r"prompts\[1\]: text has half of a character") as refused:
        read_check_request(b'{"prompts": [{"text": "a"}, {"text": "\\ud800"}]}')
    assert refused.value.status == 400


def test_the_cases_are_the_same_for_the_same_seed_and_of_every_kind() -> None:
    made = requests.cases(3, 150)
    assert made == requests.cases(3, 150)
    assert made[:10] == requests.cases(3, 10)
    assert made != requests.cases(4, 150)
    assert len({case.kind for case in made}) == 10


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b'HTTP/1.1 500 Oh\r\n\r\n{"error": "oh"}',
        b'HTTP/1.1 302 Found\r\n\r\n{"error": "oh"}',
        b"HTTP/1.1 400 No\r\n\r\nno",
        b'HTTP/1.1 400 No\r\n\r\n{"error": "two\\nlines"}',
        b'HTTP/1.1 200 OK\r\n\r\n{"rewards": []}',
    ],
)
def test_what_the_campaign_would_find(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_exchanged", lambda data, whole=True: answer)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        requests.run(requests.Case("made up", b"POST "))
