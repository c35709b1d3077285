"""Rewards computed beside the sampling of the next images; a reward that is slow or dies is tried again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from dgpo_plugin.common.errors import StopNow, UserError
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import told
from dgpo_plugin.distributed.device import best_device, make_current
from dgpo_plugin.rewards.base import RewardSet, WeightedReward, checked_rewards

RETRY_PAUSE = 1.0
"""Seconds before the first retry; doubled before each further one."""


class Scorer:
    """Scores micro-batches in their order, one reward at a time, in a thread of its own.

    Args:
        failures: folder for the pictures and prompts of a reward that failed for good; None to save nothing.

    Attributes:
        rewards: what it scores with.
    """

    def __init__(self, rewards: RewardSet, failures: Path | None = None) -> None:
        self.rewards = rewards
        self._failures = failures
        self._device = best_device()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._unreturned = ""  # the label of a reward whose call was given up

    def submit(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Future[tuple[Tensor, float]]:
        """Scores (N, K) of float32 (N, 3, H, W) pictures by the K rewards, and the seconds they took.

        A reward that fails is asked again, ``retries`` times. One that takes longer than ``timeout`` is waited for as
        long again instead, because two calls at once in one network would spoil each other; a late answer counts.

        The future raises UserError if every attempt failed; for the second time-out (the first without retries),
        after which no reward is asked anything more; and for what :func:`~dgpo_plugin.rewards.checked_rewards`
        refuses, which is not tried again.
        """
        return self._pool.submit(self._score, pictures, prompts)

    def _score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
        if self._unreturned:
            raise UserError(f"reward {self._unreturned}: an earlier call has not returned; start the program again")
        started = time.perf_counter()
        try:
            columns = [self._column(label, member, pictures, prompts) for label, member in self.rewards.members.items()]
        except UserError as error:
            raise UserError(f"{error}{self._save(pictures, prompts)}") from error
        return torch.stack(columns, dim=1), time.perf_counter() - started

    def _column(self, label: str, member: WeightedReward, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One reward's scores (N,), after as many attempts as it may take."""
        scoring = member.scoring
        call: Future[Tensor] | None = None
        problem, late = "", 0
        for attempt in range(scoring.retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
            call = call or self._call(label, member, pictures, prompts)
            if call not in wait([call], scoring.timeout).done:
                late += 1
                if late == 2:
                    break
                continue
            try:
                return call.result()
            except (StopNow, UserError):
                raise
            except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
                call, problem = None, f"failed {attempt + 1} times, last with {told(error)}"
        if call is not None:
            self._unreturned = label
            problem = (
                f"timed out {'twice' if late == 2 else 'once'}, no answer in {scoring.timeout:g} s and the call "
                f"goes on; raise scoring.timeout, find out what the reward waits for, or set its isolate: true, "
                f"with which a time-out ends the call"
            )
        raise UserError(f"reward {label}: {problem}")

    def _call(self, label: str, member: WeightedReward, pictures: Tensor, prompts: Sequence[Prompt]) -> Future[Tensor]:
        return ask_apart(self._device, lambda: checked_rewards(member.reward, pictures, prompts, label))

    def _save(self, pictures: Tensor, prompts: Sequence[Prompt]) -> str:
        """Keep what the rewards were asked to judge, and say where."""
        if self._failures is None:
            return ""
        for index, picture in enumerate(pictures):
            with atomic_path(self._failures / f"{index:04d}.png") as temporary:
                to_image(picture).save(temporary)
        lines = [json.dumps({"prompt": p.text, **p.metadata}) for p in prompts]
        write_text_atomically(self._failures / "prompts.jsonl", "\n".join(lines) + "\n")
        return f"; its pictures and prompts are in {self._failures}"


def ask_apart(device: torch.device, ask: Callable[[], Tensor]) -> Future[Tensor]:
    """Ask a reward in a daemon thread: one that never returns must not keep the program from ending.

    Args:
        device: what ``cuda`` alone means in that thread.
    """
    answer: Future[Tensor] = Future()

    def call() -> None:
        try:
            make_current(device)
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return answer
