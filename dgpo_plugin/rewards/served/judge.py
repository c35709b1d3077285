"""Vision-language models as judges, behind any OpenAI-compatible endpoint (vLLM, SGLang, ...); UnifiedReward is one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.base import Reward
from dgpo_plugin.rewards.served.wire import RequestFailed, as_png, ask, checked_urls, secret

RETRY_PAUSE = 1.0
"""Seconds before the second attempt; doubled before each further one."""
LONGEST_ANSWER = 1024
"""Tokens."""
FINAL_SCORE = r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)(?!\.?\w)"
"""The number behind the words, bold or not; not a part of a longer number or word."""
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
    408, 429, 5xx), or whose answer holds no such number, is sent again to the next server after a pause. The first
    attempt is greedy; after an answer that was of no use the judge is asked at temperature 0.7, with the attempt's
    number as the seed, since a greedy judge would only repeat itself.

    Attributes:
        url: of the endpoint, as in ``http://127.0.0.1:8000/v1``, or a list of such with the same model.
        model: its name there.
        question: a text file with ``{prompt}`` where the prompt goes.
        answer: a regular expression whose first group is the number; where it is found more than once, all must agree.
        lowest, highest: of the numbers that are valid.
        concurrency: requests at once.
        attempts: for each picture.
        timeout: seconds an attempt may take.
        key_variable: the environment variable that holds the endpoint's key.

    Raises:
        UserError: a setting is missing or wrong; from a call: a request is refused, or no attempt gave a valid number.
    """

    url: str | Sequence[str] = ()
    model: str = ""
    question: str = ""
    lowest: float = math.nan
    highest: float = math.nan
    answer: str = FINAL_SCORE
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
        if self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0:
            raise UserError("options concurrency and attempts must be at least 1, and timeout more than 0 seconds")
        self._urls = checked_urls("option url", self.url)
        self._key = secret("option key_variable", self.key_variable)
        self._template = self._read_question()
        try:
            self._pattern = re.compile(self.answer)
        except re.error as error:
            raise UserError(f"option answer: not a regular expression ({error})") from error
        if not self._pattern.groups:
            raise UserError(f"option answer: {self.answer!r} has no group; put the number's part in parentheses")

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
        image_url = {"url": f"data:image/png;base64,{as_png(image)}"}
        question = self._template.replace("{prompt}", prompt.text)
        content = [{"type": "image_url", "image_url": image_url}, {"type": "text", "text": question}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": LONGEST_ANSWER,
            "temperature": 0.0,
        }
        url = problem = ""
        for attempt in range(self.attempts):
            if attempt and stop.wait(RETRY_PAUSE * 2 ** (attempt - 1)):
                break
            url = self._urls[(number + attempt) % len(self._urls)]
            try:
                answer = ask(f"{url}/chat/completions", body, token=self._key, timeout=self.timeout)
                return self.number(answer)
            except RequestFailed as error:
                if not error.temporary:
                    raise UserError(f"{url} answers {error}") from error
                problem = str(error)
            except ValueError as error:
                problem = str(error)
                body |= {"temperature": 0.7, "seed": attempt + 1}
        raise UserError(
            f"no valid answer in {self.attempts} attempts for prompt {prompt.text!r}, last from {url}: {problem}"
        )

    def number(self, answer: Any) -> float:
        """The one number of an endpoint's answer.

        Raises:
            ValueError: it was cut off, or holds no number, several, or one that is not valid.
        """
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"no text in the answer {str(answer)[:200]!r}") from error
        if choice.get("finish_reason") == "length":
            raise ValueError(f"an answer cut off after {LONGEST_ANSWER} tokens: {text[-200:]!r}")
        found = {match.group(1) for match in self._pattern.finditer(text)}
        if len(found) != 1:
            raise ValueError(f"{'several numbers' if found else 'no number'} in the answer {text[-200:]!r}")
        value = float(found.pop() or "")
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"{value:g}, not from {self.lowest:g} to {self.highest:g}, in the answer {text[-200:]!r}")
        return value


@dataclass(kw_only=True)
class UnifiedReward(JudgeReward):
    """CodeGoat24/UnifiedReward (arXiv 2503.05236) scoring one picture from 1 to 5, by default in our wording."""

    model: str = "CodeGoat24/UnifiedReward-7b-v1.5"
    lowest: float = 1.0
    highest: float = 5.0

    def _read_question(self) -> str:
        return super()._read_question() if self.question else UNIFIED_REWARD_QUESTION
