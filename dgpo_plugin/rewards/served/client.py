"""Rewards from servers (``dgpo serve-reward``): they share the pictures, and one that fails is left out."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardConfig
from dgpo_plugin.rewards.served.wire import RequestFailed, as_png, ask, checked_urls, secret

HEALTH_SECONDS = 10.0
"""Within which a server must say that it is well."""

log = logging.getLogger(__name__)


class RemoteReward:
    """What one or several servers answer, in the pictures' order.

    Pictures travel as 8-bit PNG, so rewards are those of the pictures rounded to multiples of 1/255. Each server takes
    the next batch when it is free. One that cannot be reached, does not answer in time or fails (5xx) is left out with
    a warning, and its batch sent to another; it is asked for its health in the next call, or when no other is left. A
    request that a server refuses (4xx: the token, the size, or the reward's own error) is an error at once, as every
    server would refuse it.

    Args:
        urls: of servers that give the same reward in the same version, such as ``http://127.0.0.1:8000``.
        token_variable: the environment variable that holds their token.
        batch_size: pictures a request; ``reward.batch_size`` if left out.
        timeout: seconds a request may take, its wait for other clients' requests included.

    Raises:
        UserError: a server is not well, or they do not all serve the same.
    """

    def __init__(
        self,
        config: RewardConfig | None = None,
        *,
        urls: str | Sequence[str] = (),
        token_variable: str | None = None,
        batch_size: int | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.batch_size = (config or RewardConfig()).batch_size if batch_size is None else batch_size
        if self.batch_size < 1 or timeout <= 0:
            raise UserError("reward remote: batch_size must be at least 1 and timeout more than 0 seconds")
        self.timeout = timeout
        self.urls = checked_urls("reward remote: option urls", urls)
        self._token = secret("reward remote: option token_variable", token_variable)
        self._left_out: dict[str, str] = {}
        try:
            self.serves = self._health(self.urls[0])
            for url in self.urls[1:]:
                self._check_health(url)
        except RequestFailed as error:
            raise UserError(f"reward remote: {error}; start its servers first, or take it out of urls") from error

    @property
    def title(self) -> str:
        """What is served, for the cards of adapters that were trained on it."""
        return f"{' '.join(self.serves)} (served)"

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
        # What each server is at: a batch, by its number, or saying how it is.
        running: dict[Future[Tensor | None], tuple[str, int | None]] = {}
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
                        raise UserError(f"reward remote: no server is left ({self._reasons()}); start them again")
                    last_chance = True
                    running = {pool.submit(self._check_health, url): (url, None) for url in self.urls}
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    server, batch = running.pop(done)
                    try:
                        answer = done.result()
                    except RequestFailed as error:
                        self._failed(server, batch, error)
                        if batch is not None:
                            waiting.appendleft(batch)
                        continue
                    free.append(server)
                    if answer is not None and batch is not None:
                        answers[batch] = answer
                    else:
                        log.warning("reward remote: %s is back", server)
                        self._left_out.pop(server, None)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return torch.cat([torch.empty(0), *(answers[number] for number in sorted(answers))])

    def _failed(self, url: str, batch: int | None, error: RequestFailed) -> None:
        """Leave a server out, or tell the user if the request is at fault."""
        if batch is not None and not error.passing:
            raise UserError(f"reward remote: {url} answers {error}") from error
        if batch is not None:
            log.warning("reward remote: %s is left out: %s", url, error)
        self._left_out[url] = str(error)

    def _reasons(self) -> str:
        return "; ".join(f"{url}: {reason}" for url, reason in self._left_out.items())

    def _score(self, url: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        body = {
            "images": [as_png(image) for image in images],
            "prompts": [{"text": prompt.text, "metadata": dict(prompt.metadata)} for prompt in prompts],
        }
        answer = ask(f"{url}/score", body, token=self._token, timeout=self.timeout)
        values = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != len(images) or not all(_is_number(value) for value in values):
            raise RequestFailed(None, f"an answer without {len(images)} rewards")
        return torch.tensor(values, dtype=torch.float32)

    def _health(self, url: str) -> tuple[str, str]:
        """Name and version of what a server serves."""
        try:
            answer = ask(f"{url}/health", token=self._token, timeout=min(self.timeout, HEALTH_SECONDS))
        except RequestFailed as error:
            raise RequestFailed(error.status, f"{url} is not well ({error})") from error
        if not isinstance(answer, dict) or answer.get("ready") is not True:
            raise RequestFailed(None, f"{url} is not ready, or is no reward server")
        return str(answer.get("name")), str(answer.get("version"))

    def _check_health(self, url: str) -> None:
        found = self._health(url)
        if found != self.serves:
            raise RequestFailed(
                None, f"{url} serves {' '.join(found)}, others {' '.join(self.serves)}; start all with the same"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
