"""Reward servers in a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dgpo_plugin.rewards import as_reward
from dgpo_plugin.rewards.served.server import RewardServer


@contextmanager
def serving(
    reward: Any, version: str = "1", *, name: str = "plain", host: str = "127.0.0.1", port: int = 0, **options: Any
) -> Iterator[str]:
    """A server of a function or reward; its address."""
    made = RewardServer(as_reward(reward), (name, version), address=(host, port), **options)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.address[1]}"
    finally:
        made.stop()
        thread.join()
