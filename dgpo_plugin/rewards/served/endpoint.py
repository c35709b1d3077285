"""An endpoint that many pictures share: when it asks to be left alone, all of them wait, once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock

LONGEST_PAUSE = 60.0
"""Seconds that a server is left alone at most, whatever it asks for; then it is asked again."""
JITTER = 0.25
"""Of a pause, that is added by chance, so that those who waited together do not come back together."""


@dataclass
class Endpoint:
    """An address, and until when it is left alone; safe to use from several threads.

    Attributes:
        url: without the slash at the end.
        first_pause: seconds after a busy answer that says no time; doubled after each further one.
        clock: seconds, from any beginning.
    """

    url: str
    first_pause: float = 1.0
    clock: Callable[[], float] = time.monotonic
    _lock: Lock = field(default_factory=Lock, repr=False)
    _free_at: float = field(default=-float("inf"), repr=False)
    _busy: int = field(default=0, repr=False)

    def free_in(self) -> float:
        """Seconds until it may be asked; 0 for now."""
        return max(self._free_at - self.clock(), 0.0)

    def wait(self, stop: Event) -> bool:
        """Sleep until it may be asked, and a little longer by chance; False if ``stop`` was set before."""
        while left := self.free_in():
            # A source of its own: draws from the program's would change what is drawn elsewhere.
            if stop.wait(left * (1 + JITTER * random.SystemRandom().random())):
                return False
        return not stop.is_set()

    def answered(self) -> None:
        """Note that it works again."""
        with self._lock:
            self._busy = 0

    def leave_alone(self, sent_at: float, asked: float | None) -> float:
        """Begin a pause, or lengthen the one that is on, after an answer that it is busy.

        Args:
            sent_at: when the request was sent, by ``clock``: of those that were under way together only the first
                makes the next pause longer.
            asked: seconds that the server wants; None if it does not say.

        Returns:
            How many seconds are left of the pause.
        """
        with self._lock:
            now, first = self.clock(), sent_at >= self._free_at
            self._busy += first
            if asked or first:
                pause = asked or self.first_pause * 2 ** min(self._busy - 1, 20)
                self._free_at = max(self._free_at, now + min(pause, LONGEST_PAUSE))
            return max(self._free_at - now, 0.0)
