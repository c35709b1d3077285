"""Vision-language models as judges, behind any OpenAI-compatible endpoint (vLLM, SGLang, ...); UnifiedReward is one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward
from dgpo_plugin.rewards.served.answer_score import Scale, matched_score, score_in
from dgpo_plugin.rewards.served.answer_text import answer_text
from dgpo_plugin.rewards.served.endpoint import Endpoint
from dgpo_plugin.rewards.served.http_client import (
    RequestFailed,
    ask,
    checked_number,
    checked_seconds,
    checked_urls,
)
from dgpo_plugin.rewards.served.wire import as_png, secret

RETRY_PAUSE = 1.0
"""Seconds before the second attempt; doubled before each further one."""
PATIENCE = 600.0
"""Seconds that one picture waits at most for endpoints that are busy; each such answer counts as one at least."""
OWN_FIELDS = ("model", "messages", "stream", "n")
"""Of a request, that the option ``body`` may not set: ours, or such that another answer would come."""
CLIENTS_HEADERS = ("host", "content-length", "transfer-encoding", "connection")
UNIFIED_REWARD_QUESTION = """\
Below is a text caption, and above it an image that was generated from that caption. Judge the image by two criteria:
1. Alignment with the Caption: are the objects, their attributes and their relationships those of the caption?
2. Overall Image Quality: is the image clear, detailed, true in colour and pleasing to look at?
Weigh both and assign a score from 1 to 5 after 'Final Score:'.
Text Caption: [{prompt}]"""
"""What the published question asks for (CodeGoat24/UnifiedReward, pointwise image generation), in other words but for
the criteria's names, the form of the answer and of the caption."""


@dataclass(kw_only=True)
class JudgeReward(Reward):
    """The number that a judge's answer holds, for each picture by itself.

    Requests run at the same time and go round the servers; one that fails in passing (no connection, no answer in time,
    408, 5xx), or whose answer holds no such number, is sent again to the next server after a pause. The first attempt
    is greedy; after an answer that was of no use the judge is asked at temperature 0.7, with the attempt's number as
    the seed, since a greedy judge would only repeat itself. A server that is busy (429, or 503 while its model loads)
    is left alone by all pictures for as long as it asks, which counts as no attempt.

    Attributes:
        url: of the endpoint, as in ``http://127.0.0.1:8000/v1``, or a list of such with the same model.
        model: its name there.
        question: a text file with ``{prompt}`` where the prompt goes.
        answer: a regular expression whose first group is the number; where it is found more than once, all must agree.
            None for our own reading of ``Final Score: x`` and its like (:mod:`.answer_score`).
        lowest, highest: of the numbers that are valid.
        max_tokens: of an answer, its thinking included; None to leave that to the endpoint.
        body: further fields of the request, such as ``max_completion_tokens``; one of ours by that name is replaced, or
            with None left out.
        headers: further headers of the request, in the same way; ``{key}`` in one is the endpoint's key.
        concurrency: requests at once.
        attempts: for each picture.
        timeout: seconds an attempt may take, from the first byte sent to the last one read.
        key_variable: the environment variable that holds the endpoint's key.

    Raises:
        UserError: a setting is missing or wrong; from a call: a request is refused, or no attempt gave a valid number.
    """

    url: str | Sequence[str] = ()
    model: str = ""
    question: str = ""
    lowest: float = math.nan
    highest: float = math.nan
    answer: str | None = None
    max_tokens: int | None = 1024
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    concurrency: int = 16
    attempts: int = 4
    timeout: float = 120.0
    key_variable: str | None = None

    def __post_init__(self) -> None:
        for option, value in (("url", self.url), ("model", self.model)):
            if not value:
                raise UserError(f"option {option} is missing; give it")
        if not self.lowest < self.highest:
            raise UserError("options lowest and highest: give both, the smaller first")
        checked_number("concurrency", self.concurrency)
        checked_number("attempts", self.attempts)
        checked_seconds("timeout", self.timeout)
        if self.max_tokens is not None and (isinstance(self.max_tokens, bool) or self.max_tokens < 1):
            raise UserError("option max_tokens must be at least 1, or null to leave it to the endpoint")
        self._endpoints = [Endpoint(url, RETRY_PAUSE) for url in checked_urls("option url", self.url)]
        self._key = secret("option key_variable", self.key_variable)
        self._headers = _checked_headers(self.headers, self._key)
        _check_body(self.body)
        self._template = self._read_question()
        self._pattern = None if self.answer is None else self._compiled(self.answer)

    @staticmethod
    def _compiled(answer: str) -> re.Pattern[str]:
        try:
            pattern = re.compile(answer)
        except re.error as error:
            raise UserError(f"option answer: not a regular expression ({error})") from error
        if not pattern.groups:
            raise UserError(f"option answer: {answer!r} has no group; put the number's part in parentheses")
        return pattern

    def _read_question(self) -> str:
        if not self.question:
            raise UserError("option question is missing; give a text file with {prompt} where the prompt goes")
        try:
            text = Path(self.question).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"option question: {self.question} cannot be read as UTF-8 text; check the path") from error
        if "{prompt}" not in text:
            raise UserError(f"option question: {self.question} must hold {{prompt}}, where the prompt goes")
        return text.strip()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (N,) of pictures (N, 3, H, W) in [0, 1], between ``lowest`` and ``highest``."""
        stop = Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            futures = [
                pool.submit(self._judge_unless, stop, number, image, prompt)
                for number, (image, prompt) in enumerate(zip(images, prompts, strict=True))
            ]
            for done in wait(futures, return_when=FIRST_EXCEPTION).done:
                done.result()
            return torch.tensor([future.result() for future in futures], dtype=torch.float32)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _judge_unless(self, stop: Event, number: int, image: Tensor, prompt: Prompt) -> float:
        """The judge's number for one picture, or NaN once another has failed, which the caller then raises.

        The one that fails says so itself: the pool's thread would else begin the next picture before the caller wakes.
        """
        if stop.is_set():
            return math.nan
        try:
            return self._judge(number, image, prompt, stop)
        except BaseException:
            stop.set()
            raise

    def _judge(self, number: int, image: Tensor, prompt: Prompt, stop: Event) -> float:
        """The judge's number for one picture.

        Args:
            number: the picture's; it says whose turn it is to answer first.
            stop: ends it between two attempts.
        """
        request = self._request(image, prompt)
        varied: dict[str, Any] = {}
        turn, attempt, waited = number, 0, 0.0
        problem = ""
        while attempt < self.attempts:
            # The next in turn, or whoever is free the soonest.
            in_turn = [self._endpoints[(turn + at) % len(self._endpoints)] for at in range(len(self._endpoints))]
            endpoint = min(in_turn, key=lambda each: each.free_in())
            turn += 1
            if not endpoint.wait(stop):
                break
            sent_at = endpoint.clock()
            try:
                return self._ask(endpoint, request | varied)
            except RequestFailed as error:
                problem = f"{endpoint.url}: {error}"
                if not error.temporary:
                    raise UserError(f"{endpoint.url} answers {error}") from error
                if error.busy:
                    waited += max(endpoint.leave_alone(sent_at, error.retry_after), 1.0)
                    if waited > PATIENCE:
                        raise UserError(f"busy for {PATIENCE:g} s, last {problem}; try again later") from error
                    continue
            except ValueError as error:
                problem = f"{endpoint.url}: {error}"
                varied = {"temperature": 0.7, "seed": attempt + 1}
            attempt += 1
            if attempt < self.attempts and stop.wait(RETRY_PAUSE * 2 ** (attempt - 1)):
                break
        raise UserError(f"no valid answer in {self.attempts} attempts for prompt {prompt.text!r}, last from {problem}")

    def _request(self, image: Tensor, prompt: Prompt) -> dict[str, Any]:
        """What is asked of one picture, without what the user's ``body`` changes."""
        image_url = {"url": f"data:image/png;base64,{as_png(image)}"}
        question = self._template.replace("{prompt}", prompt.text)
        content = [{"type": "image_url", "image_url": image_url}, {"type": "text", "text": question}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }

    def _ask(self, endpoint: Endpoint, request: Mapping[str, Any]) -> float:
        """The number that an endpoint answers to a request."""
        body = {name: value for name, value in {**request, **self.body}.items() if value is not None}
        url = f"{endpoint.url}/chat/completions"
        answer = ask(url, body, token=self._key, headers=self._headers, timeout=self.timeout)
        endpoint.answered()
        return self.number(answer)

    def number(self, answer: Any) -> float:
        """The one number of an endpoint's answer.

        Raises:
            ValueError: it was cut off or refused, or holds no number, several, or one that is not valid.
        """
        text = answer_text(answer)
        scale = Scale(self.lowest, self.highest)
        try:
            return score_in(text, scale) if self._pattern is None else matched_score(text, self._pattern, scale)
        except ValueError as error:
            raise ValueError(f"{error} in the answer {text[-200:]!r}") from error


def _check_body(body: Any) -> None:
    """Refuse further fields of a request that cannot be sent, or that would change what is asked.

    Raises:
        UserError: not a table of what JSON holds, or with a field of ours.
    """
    if not isinstance(body, Mapping):
        raise UserError("option body: must be a table of fields, such as {max_completion_tokens: 2048}")
    for name in body:
        if name in OWN_FIELDS:
            raise UserError(f"option body: {name} cannot be set there; leave it out")
    try:
        json.dumps(dict(body), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"option body: cannot be sent as JSON ({error}); write numbers, texts, lists and tables"
        ) from error


def _checked_headers(headers: Any, key: str | None) -> dict[str, str | None]:
    """Further headers of a request, with the key where ``{key}`` stands.

    Raises:
        UserError: not a table of names and texts that fit into headers, or the key is missing.
    """
    if not isinstance(headers, Mapping):
        raise UserError("option headers: must be a table, such as {x-team: vision}")
    found: dict[str, str | None] = {}
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", str(name)) or str(name).lower() in CLIENTS_HEADERS:
            raise UserError(f"option headers: {name!r} cannot be set; leave it out")
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise UserError(f"option headers: {name} must be a text, or null to leave it out")
        text = None if value is None else str(value)
        if text is not None and "{key}" in text and key is None:
            raise UserError(f"option headers: {name} holds {{key}}; name its environment variable in key_variable")
        if text is not None and not (text.isascii() and text.isprintable()):
            raise UserError(f"option headers: {name} may hold letters, digits and signs only")
        found[str(name)] = None if text is None else text.replace("{key}", key or "")
    return found


@dataclass(kw_only=True)
class UnifiedReward(JudgeReward):
    """CodeGoat24/UnifiedReward (arXiv 2503.05236) scoring one picture from 1 to 5, by default in our wording."""

    model: str = "CodeGoat24/UnifiedReward-7b-v1.5"
    lowest: float = 1.0
    highest: float = 5.0

    def _read_question(self) -> str:
        return super()._read_question() if self.question else UNIFIED_REWARD_QUESTION
