"""Rewards computed beside the sampling of the next images; a reward that is slow or dies is tried again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from dgpo_plugin.common.errors import StopNow, UserError, in_one_line
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardConfig
from dgpo_plugin.distributed.device import best_device, make_current
from dgpo_plugin.rewards.base import Reward, as_sum

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
        self._given_up = False

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[tuple[Tensor, float]]:
        """Rewards (N, K) of float32 (N, 3, H, W) pictures, K = 1 or a sum's terms, and the seconds they took.

        A reward that fails is asked again, ``retries`` times. One that takes longer than ``timeout`` is waited for as
        long again instead, because two calls at once in one network would spoil each other; a late answer counts.

        The future raises UserError if every attempt failed; for the second time-out (the first without retries),
        after which the reward is asked nothing more; and for what :func:`~dgpo_plugin.rewards.checked_rewards`
        refuses, which is not tried again.
        """
        return self._pool.submit(self._score, images, prompts)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
        if self._given_up:
            raise UserError(f"reward {self._config.label}: an earlier call has not returned; start the program again")
        started = time.perf_counter()
        call: Future[Tensor] | None = None
        problem, late = "", 0
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
            call = call or self._call(images, prompts)
            if call not in wait([call], self._config.timeout).done:
                late += 1
                if late == 2:
                    break
                continue
            try:
                return call.result(), time.perf_counter() - started
            except StopNow:
                raise
            except UserError as error:
                raise UserError(f"{error}{self._save(images, prompts)}") from error
            except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
                call, problem = None, f"failed {attempt + 1} times, last with {in_one_line(error)}"
        if call is not None:
            self._given_up = True
            problem = (
                f"timed out {'twice' if late == 2 else 'once'}, no answer in {self._config.timeout:g} s and the call "
                f"goes on; raise reward.timeout, or find out what the reward waits for"
            )
        raise UserError(f"reward {self._config.label}: {problem}{self._save(images, prompts)}")

    def _call(self, images: Tensor, prompts: Sequence[Prompt]) -> Future[Tensor]:
        """Ask in a daemon thread: a reward that never returns must not keep the program from ending."""
        answer: Future[Tensor] = Future()

        def call() -> None:
            try:
                make_current(self._device)
                answer.set_result(as_sum(self.reward, self._config.label).parts(images, prompts))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
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
