"""Rewards computed beside the sampling of the next images; a reward that is slow or dies is tried again."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dgpo_plugin.common.errors import StopNow, UserError, prefixed
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import told
from dgpo_plugin.distributed.device import best_device, make_current
from dgpo_plugin.rewards.base import RewardSet, WeightedReward, called, refuse_not_finite

RETRY_PAUSE = 1.0
"""Seconds before the first retry; doubled before each further one."""


@dataclass(frozen=True)
class _Unscored:
    """A picture, (3, H, W), that a reward could not judge, and why."""

    picture: Tensor
    prompt: Prompt
    problem: str = ""

    def told(self) -> dict[str, object]:
        """The prompt as a line of a prompt file, and why, if that is known of this picture."""
        why = {"problem": self.problem} if self.problem else {}
        return {"prompt": self.prompt.text, **self.prompt.metadata, **why}


class Scorer:
    """Scores micro-batches in their order, one reward at a time, beside whoever submits them.

    Args:
        failures: folder for the pictures and prompts of a reward that failed for good; None to save nothing.
        process: the number of this process, which those files are then named by; None if there is but one.

    Attributes:
        rewards: what it scores with.
    """

    def __init__(self, rewards: RewardSet, failures: Path | None = None, process: int | None = None) -> None:
        self.rewards = rewards
        self._failures = failures
        self._prefix = "" if process is None else f"process-{process}-"
        self._unscored: list[_Unscored] = []
        self._device = best_device()
        self._last: Future[tuple[Tensor, float]] | None = None
        self._unreturned = ""  # the label of a reward whose call was given up

    def submit(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Future[tuple[Tensor, float]]:
        """Scores (N, K) of float32 (N, 3, H, W) pictures by the K rewards, and the seconds they took.

        Where ``on_failure`` is ``skip``, a score that could not be had is NaN: one that was not finite, or of a picture
        that the reward failed for, after all its attempts, with the whole micro-batch and then alone.

        A reward that fails is asked again, ``retries`` times. One that takes longer than ``timeout`` is waited for as
        long again instead, because two calls at once in one network would spoil each other; a late answer counts.

        The future raises UserError if every attempt failed, and for what
        :func:`~dgpo_plugin.rewards.checked_rewards` refuses, which is not tried again; and, whatever ``on_failure``
        is, for the second time-out (the first without retries), after which no reward is asked anything more.
        """
        before, answer = self._last, Future[tuple[Tensor, float]]()

        def score() -> None:
            wait([] if before is None else [before])
            try:
                answer.set_result(self._score(pictures, prompts))
            except BaseException as error:
                answer.set_exception(error)

        # Not of a pool, whose threads a program waits for before it ends: a judge may not answer for minutes.
        threading.Thread(target=score, name="reward", daemon=True).start()
        self._last = answer
        return answer

    def _score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, float]:
        if self._unreturned:
            raise UserError(f"reward {self._unreturned}: an earlier call has not returned; start the program again")
        started = time.perf_counter()
        try:
            columns = [self._column(label, member, pictures, prompts) for label, member in self.rewards.members.items()]
        except UserError as error:
            asked = [_Unscored(*pair) for pair in zip(pictures, prompts, strict=True)]
            raise UserError(f"{error}{self._save(asked)}") from error
        return torch.stack(columns, dim=1), time.perf_counter() - started

    def say_unscored(self) -> str:
        """Why and where the pictures are that no score could be had for since this was asked last; empty if none.

        They are saved in the folder for failures, in the place of what was there.
        """
        unscored, self._unscored = self._unscored, []
        return f"the last: {unscored[-1].problem}{self._save(unscored)}" if unscored else ""

    def _column(self, label: str, member: WeightedReward, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One reward's scores (N,), NaN where there is none and such pictures are skipped."""
        skip = member.scoring.on_failure == "skip"
        try:
            values = self._attempts(label, member, pictures, prompts)
        except UserError as error:
            if not skip or self._unreturned:
                raise
            if len(pictures) == 1:
                self._unscored.append(_Unscored(pictures[0], prompts[0], str(error)))
                return torch.tensor([math.nan])
            # So that one picture costs one: each alone, and once, for the whole was tried often enough.
            once = replace(member, scoring=member.scoring.model_copy(update={"retries": 0}))
            alone = [self._column(label, once, pictures[n : n + 1], [prompt]) for n, prompt in enumerate(prompts)]
            return torch.cat(alone)
        if not skip:
            advice = "mend the reward, or leave such pictures out with scoring.on_failure skip"
            with prefixed(f"reward {label}"):
                refuse_not_finite(values, prompts, advice)
        broken = ~values.isfinite()
        for n in broken.nonzero().flatten().tolist():
            problem = f"reward {label}: {values[n].item()} is not finite"
            self._unscored.append(_Unscored(pictures[n], prompts[n], problem))
        return values.masked_fill(broken, math.nan)

    def _attempts(self, label: str, member: WeightedReward, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One reward's values (N,), finite or not, after as many attempts as it may take."""
        scoring = member.scoring
        call: Future[Tensor] | None = None
        given_up = threading.Event()
        problem, late = "", 0
        for attempt in range(scoring.retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 2 ** (attempt - 1))
            call = call or self._call(label, member, pictures, prompts, given_up)
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
            given_up.set()
            self._unreturned = label
            problem = (
                f"timed out {'twice' if late == 2 else 'once'}, no answer in {scoring.timeout:g} s and the call "
                f"goes on; raise scoring.timeout, find out what the reward waits for, or set its isolate: true, "
                f"with which a time-out ends the call"
            )
        raise UserError(f"reward {label}: {problem}")

    def _call(
        self,
        label: str,
        member: WeightedReward,
        pictures: Tensor,
        prompts: Sequence[Prompt],
        given_up: threading.Event,
    ) -> Future[Tensor]:
        def ask() -> Tensor:
            with prefixed(f"reward {label}"):
                return called(member.reward, pictures, prompts, given_up)

        return ask_apart(self._device, ask)

    def _save(self, asked: Sequence[_Unscored]) -> str:
        """Keep what the rewards were asked to judge, alone in this process's files, and say where."""
        if self._failures is None or not self._failures.parent.is_dir():
            return ""
        try:
            self._write(self._failures, asked)
        except (UserError, OSError):  # which must not hide why there is something to keep
            return f"; its pictures and prompts could not be kept in {self._failures}"
        return f"; its pictures and prompts are in {self._failures / self._prefix}{'*' if self._prefix else ''}"

    def _write(self, folder: Path, asked: Sequence[_Unscored]) -> None:
        for old in folder.glob(f"{self._prefix}[0-9][0-9][0-9][0-9].png"):
            old.unlink()
        for index, one in enumerate(asked):
            with atomic_path(folder / f"{self._prefix}{index:04d}.png") as temporary:
                to_image(one.picture).save(temporary)
        lines = [json.dumps(one.told()) + "\n" for one in asked]
        write_text_atomically(folder / f"{self._prefix}prompts.jsonl", "".join(lines))


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
