"""A reward in a process of its own (``isolate: true``): a time-out ends that process, and the next call starts another.

The two talk through the child's standard input and output, in frames of a length and bytes: JSON, and pictures as
their float32 values, so that scores are those of a reward in this process. What the reward prints goes to standard
error. The process ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from typing import IO, Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.faults import how_it_ended
from dgpo_plugin.common.others_code import others_code
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import seeded_globals
from dgpo_plugin.common.user_file import is_from_file, loaded_hash, note_sources, told
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.distributed.device import best_device, make_current
from dgpo_plugin.rewards.base import Reward, as_scores
from dgpo_plugin.rewards.scorer import ask_apart

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dgpo_plugin.rewards.isolated import serve; serve()"
)


class ChildError(Exception):
    """What happened in a reward's process, in words: an exception there, or its end."""


class IsolatedReward(Reward):
    """A reward in a process of its own.

    Args:
        label: of the reward, and its name where ``term`` gives none.
        term, scoring: as :func:`~dgpo_plugin.rewards.load_reward` takes them.

    Raises:
        UserError: as :func:`~dgpo_plugin.rewards.load_reward`.
    """

    def __init__(self, label: str, term: RewardTerm, scoring: ScoringConfig) -> None:
        name = term.name(label)
        if is_from_file(name):
            note_sources(name, "reward")
        self._timeout = term.scoring(scoring).timeout
        self._settings = {
            "label": label,
            "term": term.model_copy(update={"isolate": False}).model_dump(mode="json"),
            "scoring": scoring.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "sha256": loaded_hash([name]),
        }
        self._child: subprocess.Popen[bytes] | None = None
        self._ended: weakref.finalize[Any, Any] | None = None
        try:
            self._start()
        except ChildError as error:
            raise UserError(f"{error} while it was loaded") from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (N,), float32, of pictures (N, 3, H, W).

        Raises:
            UserError: the reward refuses.
            TimeoutError: no answer within the time-out; the process is ended.
            ChildError: the reward raised something else, or its process died.
        """
        pictures = images.to("cpu", torch.float32).contiguous().numpy().tobytes()
        question = {
            "shape": list(images.shape),
            # How they lie in memory is the order in which a mean is summed up.
            "channels_last": images.is_contiguous(memory_format=torch.channels_last),
            "prompts": _as_json(prompts),
            # What this call's random numbers begin at, as they would here: the run's next one.
            "seed": int(torch.randint(2**32, ())),
        }
        return torch.tensor(self._ask(question, pictures)["scores"], dtype=torch.float32)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        problems: list[str] = self._ask({"prompts": _as_json(prompts)})["problems"]
        return problems

    def _start(self) -> None:
        """Start a process and have it load the reward, however long that takes."""
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._child, self._ended = child, weakref.finalize(self, _end, child)
        try:
            self.title = self._answer(child, self._settings, b"")["title"]
        except BaseException:
            self._close()
            raise

    def _ask(self, question: Mapping[str, Any], pictures: bytes = b"") -> Any:
        if self._child is None:
            self._start()
        child = self._child
        assert child is not None
        call = ask_apart(torch.device("cpu"), lambda: self._answer(child, question, pictures))
        if call not in wait([call], self._timeout).done:
            self._close()
            raise TimeoutError(f"no answer in {self._timeout:g} s, its process was ended")
        return call.result()

    def _answer(self, child: subprocess.Popen[bytes], question: Mapping[str, Any], pictures: bytes) -> Any:
        """What the process says to a question."""
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _write(child.stdin, json.dumps(question).encode())
            _write(child.stdin, pictures)
            answer = json.loads(_read(child.stdout))
        except (OSError, EOFError, ValueError) as error:
            self._close()
            raise ChildError(f"its process {how_it_ended(child.wait())}") from error
        if "refused" in answer:
            raise UserError(answer["refused"].removeprefix(f"reward {self._settings['label']}: "))
        if "failed" in answer:
            raise ChildError(answer["failed"])
        return answer

    def _close(self) -> None:
        """End the process; the next question starts another."""
        self._child = None
        if self._ended is not None:
            self._ended()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _as_json(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [{"text": p.text, "metadata": dict(p.metadata), "place": p.place} for p in prompts]


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes:
    length = stream.read(8)
    data = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8 or len(data) < int.from_bytes(length, "little"):
        raise EOFError
    return data


# ---- in the process


def serve() -> None:
    """Answer questions until the parent is gone: first what to load, then pictures and prompts."""
    # Ctrl-C reaches the whole group of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    questions, answers = _own_streams()
    reward: Reward | None = None
    while True:
        try:
            question, pictures = json.loads(_read(questions)), _read(questions)
        except EOFError:
            os._exit(0)  # whatever threads the reward has left
        try:
            if reward is None:
                reward = _loaded(question)
                answer = json.dumps({"title": str(reward.title)})
            else:
                answer = json.dumps(_answer(reward, question, pictures))
        except UserError as error:
            answer = json.dumps({"refused": str(error)})
        except BaseException as error:  # whatever a user's reward raises
            answer = json.dumps({"failed": told(error)})
        _write(answers, answer.encode())


def _end_with(parent: int) -> None:
    """End this process with its parent, a killed one included, though a reward never returns to the questions."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _own_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output for questions and answers alone; what is printed goes to standard error."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return questions, answers


def _loaded(settings: Mapping[str, Any]) -> Reward:
    from dgpo_plugin.rewards.load import load_reward  # which imports this module

    torch.set_num_threads(settings["threads"])
    make_current(best_device())
    term = RewardTerm.model_validate(settings["term"])
    reward = load_reward(settings["label"], term, ScoringConfig.model_validate(settings["scoring"]))
    if loaded_hash([term.name(settings["label"])]) != settings["sha256"]:
        raise UserError("its file was changed while the run went on; put it back, and go on with the run")
    return reward


def _answer(reward: Reward, question: Mapping[str, Any], pictures: bytes) -> dict[str, Any]:
    prompts = [Prompt(**prompt) for prompt in question["prompts"]]
    if not pictures:
        return {"problems": reward.check(prompts)}
    images = torch.frombuffer(bytearray(pictures), dtype=torch.float32).view(question["shape"])
    if question["channels_last"]:
        images = images.contiguous(memory_format=torch.channels_last)
    with others_code(), seeded_globals(question["seed"]):
        returned = reward(images, prompts)
    return {"scores": as_scores(returned, len(images)).tolist()}
