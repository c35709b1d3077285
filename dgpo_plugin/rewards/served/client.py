"""Rewards from servers (``dgpo serve-reward``): they share the pictures, and one that fails is left out."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http import HTTPStatus
from threading import Event
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.base import Reward
from dgpo_plugin.rewards.served.endpoint import Endpoint
from dgpo_plugin.rewards.served.http_client import (
    RequestFailed,
    ask,
    checked_number,
    checked_seconds,
    checked_urls,
)
from dgpo_plugin.rewards.served.wire import as_png, secret

HEALTH_SECONDS = 10.0
"""Within which a server must say that it is well."""
PROMPTS_PER_CHECK = 1000
"""In one request."""
PATIENCE = 600.0
"""Seconds that a server may ask to be left alone, before it counts as one that failed."""

log = logging.getLogger(__name__)


class RemoteReward(Reward):
    """What one or several servers answer, in the pictures' order.

    Pictures travel as 8-bit PNG, so rewards are those of the pictures rounded to multiples of 1/255. Each server takes
    the next batch when it is free. One that cannot be reached, does not answer in time or fails (5xx) is left out with
    a warning, and its batch sent to another; it is asked for its health in the next call, or when no other is left. So
    is one that was restarted with another reward or version, which every answer tells. One that is busy (429, or 503
    with ``Retry-After``) is left alone for as long as it asks, while others go on. A request that a server refuses
    (other 4xx: the token, the size, or the reward's own error) is an error at once, as every server would refuse it.

    Args:
        urls: of servers that give the same reward in the same version, such as ``http://127.0.0.1:8000``.
        token_variable: the environment variable that holds their token.
        batch_size: pictures a request; ``scoring.batch_size`` if left out.
        timeout: seconds a request may take, from the first byte sent to the last one read, its wait for other
            clients' requests included.

    Raises:
        UserError: a server is not well, or they do not all serve the same.
    """

    def __init__(
        self,
        config: ScoringConfig | None = None,
        *,
        urls: str | Sequence[str] = (),
        token_variable: str | None = None,
        batch_size: int | None = None,
        timeout: float = 120.0,
    ) -> None:
        usual = ScoringConfig() if config is None else config
        self.batch_size = usual.batch_size if batch_size is None else batch_size
        checked_number("batch_size", self.batch_size)
        self.timeout = checked_seconds("timeout", timeout)
        self.urls = checked_urls("option urls", urls)
        self._token = secret("option token_variable", token_variable)
        self._left_out: dict[str, str] = {}
        try:
            self.serves, served_title = self._health(self.urls[0])
            for url in self.urls[1:]:
                self._check_health(url)
        except RequestFailed as error:
            raise UserError(f"{error}; start its servers first, or take it out of urls") from error
        # What is served, for the cards of adapters that were trained on it.
        self.title = f"{served_title or self.serves[0]} {self.serves[1]} (served)"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (N,) of pictures (N, 3, H, W) in [0, 1].

        Raises:
            UserError: no server is left, or one refuses the request.
        """
        size = self.batch_size
        batches = [(images[at : at + size], prompts[at : at + size]) for at in range(0, len(images), size)]
        answers: dict[int, Tensor] = {}
        waiting = deque(range(len(batches)))
        free = deque(url for url in self.urls if url not in self._left_out)
        # What each server is at: a batch, by its number, or None for saying how it is, or being left alone.
        running: dict[Future[Tensor | None], tuple[str, int | None]] = {}
        pauses = _Pauses(self.urls)
        last_chance = False
        pool = ThreadPoolExecutor(len(self.urls), thread_name_prefix="remote reward")
        try:
            for url in self._left_out:
                running[pool.submit(self._check_health, url)] = url, None
            while len(answers) < len(batches):
                while waiting and free:
                    url, number = free.popleft(), waiting.popleft()
                    running[pool.submit(self._score, url, *batches[number])] = url, number
                if not running:
                    if last_chance:
                        raise UserError(f"no server is left ({self._reasons()}); start them again")
                    last_chance = True
                    running = {pool.submit(self._check_health, url): (url, None) for url in self.urls}
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    server, batch = running.pop(done)
                    try:
                        answer = done.result()
                    except RequestFailed as error:
                        if batch is not None:
                            waiting.appendleft(batch)
                            if pauses.begin(server, error):
                                running[pool.submit(pauses.wait, server)] = server, None
                                continue
                        self._failed(server, batch, error)
                        continue
                    free.append(server)
                    if answer is not None and batch is not None:
                        answers[batch] = answer
                        pauses.answered(server)
                    elif self._left_out.pop(server, None) is not None:
                        log.warning("reward remote: %s is back", server)
        finally:
            pauses.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return torch.cat([torch.empty(0), *(answers[number] for number in sorted(answers))])

    def _failed(self, url: str, batch: int | None, error: RequestFailed) -> None:
        """Leave a server out, or tell the user if the request is at fault."""
        if batch is not None and not error.temporary:
            raise UserError(f"{url} answers {error}") from error
        if batch is not None:
            log.warning("reward remote: %s is left out: %s", url, error)
        self._left_out[url] = str(error)

    def _reasons(self) -> str:
        return "; ".join(f"{url}: {reason}" for url, reason in self._left_out.items())

    def _score(self, url: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        body = {
            "images": [as_png(image) for image in images],
            "prompts": _as_json(prompts),
        }
        answer = ask(f"{url}/score", body, token=self._token, timeout=self.timeout)
        self._check_serves(url, answer)
        values = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != len(images) or not all(_is_number(value) for value in values):
            raise RequestFailed(None, f"an answer without {len(images)} rewards")
        return torch.tensor(values, dtype=torch.float32)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """Ask the first server that answers; one that has no ``/check`` finds nothing wrong.

        Raises:
            UserError: no server answers.
        """
        reasons, pauses = [], _Pauses(self.urls)
        for url in self.urls:
            try:
                return [
                    problem
                    for at in range(0, len(prompts), PROMPTS_PER_CHECK)
                    for problem in self._problems(url, prompts[at : at + PROMPTS_PER_CHECK], pauses)
                ]
            except RequestFailed as error:
                if not error.temporary:
                    raise UserError(f"{url} answers {error}") from error
                reasons.append(f"{url}: {error}")
        raise UserError(f"no server answers ({'; '.join(reasons)}); start them again")

    def _problems(self, url: str, prompts: Sequence[Prompt], pauses: _Pauses) -> list[str]:
        """What one server's reward says of prompts, once it is not busy."""
        try:
            answer = ask(f"{url}/check", {"prompts": _as_json(prompts)}, token=self._token, timeout=self.timeout)
        except RequestFailed as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return []
            if not pauses.begin(url, error):
                raise
            pauses.wait(url)
            return self._problems(url, prompts, pauses)
        self._check_serves(url, answer)
        problems = answer.get("problems") if isinstance(answer, dict) else None
        if not isinstance(problems, list):
            raise RequestFailed(None, "an answer without problems")
        return [" ".join(str(problem).split()) for problem in problems]

    def _health(self, url: str) -> tuple[tuple[str, str], str]:
        """What a server serves: its name and version, and what it calls itself on cards (empty for the name)."""
        try:
            answer = ask(f"{url}/health", token=self._token, timeout=min(self.timeout, HEALTH_SECONDS))
        except RequestFailed as error:
            raise RequestFailed(error.status, f"{url} is not well ({error})") from error
        if not isinstance(answer, dict) or answer.get("ready") is not True:
            raise RequestFailed(None, f"{url} is not ready, or is no reward server")
        return (str(answer.get("name")), str(answer.get("version"))), str(answer.get("title") or "")

    def _check_health(self, url: str) -> None:
        found, _ = self._health(url)
        if found != self.serves:
            raise RequestFailed(
                None, f"{url} serves {' '.join(found)}, others {' '.join(self.serves)}; start all with the same"
            )

    def _check_serves(self, url: str, answer: Any) -> None:
        """Refuse an answer of another reward or version, as after a restart between two requests."""
        given = answer if isinstance(answer, dict) else {}
        found = (str(given.get("name")), str(given.get("version")))
        if found != self.serves:
            raise RequestFailed(
                None, f"{url} now serves {' '.join(found)}, before {' '.join(self.serves)}; start it as it was"
            )


class _Pauses:
    """How long busy servers are left alone in one call, each up to :data:`PATIENCE` without an answer in between.

    Attributes:
        stop: ends every pause.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.stop = Event()
        self._endpoints = {url: Endpoint(url) for url in urls}
        self._waited = dict.fromkeys(urls, 0.0)

    def begin(self, url: str, error: RequestFailed) -> bool:
        """Leave a server alone if it asks for that, and has not asked for too long."""
        if not error.busy or self._waited[url] > PATIENCE:
            return False
        endpoint = self._endpoints[url]
        self._waited[url] += max(endpoint.leave_alone(endpoint.clock(), error.retry_after), 1.0)
        return True

    def wait(self, url: str) -> None:
        """Sleep until a server's pause is over."""
        self._endpoints[url].wait(self.stop)

    def answered(self, url: str) -> None:
        """Note that a server works again."""
        self._endpoints[url].answered()
        self._waited[url] = 0.0


def _as_json(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [{"text": prompt.text, "metadata": dict(prompt.metadata)} for prompt in prompts]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
