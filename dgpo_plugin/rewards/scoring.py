"""Rewards computed beside the sampling of the next images; a reward that is slow or dies is tried again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from torch import Tensor

from dgpo_plugin.config import RewardConfig
from dgpo_plugin.devices import make_current
from dgpo_plugin.errors import StopNow, UserError
from dgpo_plugin.files import atomic_path, write_text_atomically
from dgpo_plugin.processes import best_device
from dgpo_plugin.prompts import Prompt
from dgpo_plugin.rewards.base import Reward, as_sum
from dgpo_plugin.sampling import to_image

RETRY_PAUSE = 1.0
"""Seconds before the first retry; doubled before each further one."""


class Scorer:
    """Scores micro-batches in their order, one at a time, in a thread of its own.

    Args:
        failures: folder for the pictures and prompts of a reward that failed for good; None to save nothing.
    """

    def __init__(self, reward: Reward, config: RewardConfig, failures: Path | None = None) -> None:
        self.reward = reward
        self._config = config
        self._failures = failures
        self._device = best_device()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward")

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[tuple[Tensor, float]]:
        """Rewards (N, K) of float32 (N, 3, H, W) pictures, K = 1 or a sum's terms, and the seconds they took.

        The future raises UserError if the reward fails, or takes longer than ``timeout``, in ``retries`` + 1 attempts,
        or returns what :func:`~dgpo_plugin.rewards.checked_rewards` refuses, which is not tried again.
        """
        return self._pool.submit(self._score, images, prompts)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
        started = time.perf_counter()
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
            try:
                return self._attempt(images, prompts), time.perf_counter() - started
            except StopNow:
                raise
            except UserError as error:
                raise UserError(f"{error}{self._save(images, prompts)}") from error
            except Exception as error:  # whatever a user's reward raises
                problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"reward {self._config.label}: failed {self._config.retries + 1} times, last with {problem}"
            f"{self._save(images, prompts)}"
        )

    def _attempt(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One call in a daemon thread: a reward that never returns must not keep the program from ending."""
        answers: Queue[Tensor | Exception] = Queue()

        def call() -> None:
            try:
                make_current(self._device)
                answers.put(as_sum(self.reward, self._config.label).parts(images, prompts))
            except Exception as error:
                answers.put(error)

        worker = threading.Thread(target=call, daemon=True)
        worker.start()
        worker.join(self._config.timeout)
        if worker.is_alive():
            raise TimeoutError(f"no answer in {self._config.timeout:g} s (reward.timeout)")
        answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _save(self, images: Tensor, prompts: Sequence[Prompt]) -> str:
        """Keep what the reward was asked to judge, and say where."""
        if self._failures is None:
            return ""
        for index, image in enumerate(images):
            with atomic_path(self._failures / f"{index:04d}.png") as temporary:
                to_image(image).save(temporary)
        lines = [json.dumps({"prompt": p.text, **p.metadata}) for p in prompts]
        write_text_atomically(self._failures / "prompts.jsonl", "\n".join(lines) + "\n")
        return f"; its pictures and prompts are in {self._failures}"
