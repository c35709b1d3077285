"""The one thread that calls a served reward, and the requests that wait for it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, TypeVar

import torch

from dgpo_plugin.distributed.device import make_current
from dgpo_plugin.rewards.served.request_body import Refusal

WAITING = 16
"""Requests that wait while one is scored; further ones are told to come again."""
LONGEST_RETRY = 60
"""Seconds after which a request that found no place is to come again, at most."""

Result = TypeVar("Result")


class Worker:
    """Does one thing after the other in a daemon thread: what never returns must not keep the program from ending.

    Args:
        device: what ``cuda`` alone means in that thread.
        timeout: seconds that one call may take; None for any.
    """

    def __init__(self, device: torch.device, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]] | None] = deque()
        self._came = threading.Condition()
        self._busy_since: float | None = None
        self._last_took = 0.0
        threading.Thread(target=self._work, args=(device,), name="reward", daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """What the work comes to, once its turn has come; cancelled before that, it is left out.

        Raises:
            Refusal: too many wait already, or the work under way has taken too long.
        """
        self.refuse_if_full()  # the event loop's thread alone puts something in
        future: Future[Result] = Future()
        with self._came:
            self._waiting.append((future, work))
            self._came.notify()
        return future

    def refuse_if_full(self) -> None:
        """Refuse a request that would find no place.

        Raises:
            Refusal: as for :meth:`submit`.
        """
        if overdue := self.overdue():
            raise overdue
        with self._came:
            # Whose client went away takes no place.
            self._waiting = deque(each for each in self._waiting if each and not each[0].cancelled())
            full = len(self._waiting) >= WAITING
        if full:
            retry = min(max(math.ceil(self._last_took), 1), LONGEST_RETRY)
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, f"{WAITING} requests wait already; come again", retry)

    def time_left(self) -> float | None:
        """Seconds until the work under way is overdue, or work that begins now would be; None for never."""
        since = self._busy_since
        if self.timeout is None or since is None:
            return self.timeout
        return max(since + self.timeout - time.monotonic(), 0.0)

    def overdue(self) -> Refusal | None:
        """What is answered while the work under way has taken longer than it may."""
        if self._busy_since is None or self.time_left() != 0.0:
            return None
        return Refusal(
            HTTPStatus.GATEWAY_TIMEOUT,
            f"the reward has not answered in {self.timeout:g} s and its call goes on; end this server if it hangs",
        )

    def close(self) -> None:
        """Let the thread end after the work under way; what still waits is left undone."""
        with self._came:
            for each in self._waiting:
                if each:
                    each[0].cancel()
            self._waiting = deque([None])
            self._came.notify()

    def _work(self, device: torch.device) -> None:
        while (given := self._next()) is not None:
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            self._busy_since = began = time.monotonic()
            try:
                make_current(device)
                result = work()
            except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
                future.set_exception(error)
            else:
                future.set_result(result)
            self._busy_since, self._last_took = None, time.monotonic() - began

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """What is to be done, once there is something; None for the end."""
        with self._came:
            self._came.wait_for(lambda: bool(self._waiting))
            return self._waiting.popleft()
