"""``scoring.on_failure: skip``: a picture that a reward cannot judge costs that one, and is kept to be looked at."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import StopNow, UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards import RewardSet, WeightedReward, as_reward
from dgpo_plugin.rewards import scorer as scoring
from dgpo_plugin.rewards.scorer import Scorer
from tests.conftest import one_reward

pytestmark = pytest.mark.fast

PROMPTS = [Prompt("good"), Prompt("bad", {"text": "x"}), Prompt("fine"), Prompt("great")]
PICTURES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEANS = PICTURES.mean((1, 2, 3)).tolist()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RETRY_PAUSE", 0.0)


def skipping(reward: Callable[..., object], folder: Path | None = None, **settings: Any) -> Scorer:
    return Scorer(one_reward(reward, on_failure="skip", **settings), folder)


def values(images: Tensor, prompts: Sequence[Prompt], of_bad: float) -> list[float]:
    means = images.mean((1, 2, 3)).tolist()
    return [of_bad if prompt.text == "bad" else mean for prompt, mean in zip(prompts, means, strict=True)]


def raising(error: BaseException) -> Callable[..., object]:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if any(prompt.text == "bad" for prompt in prompts):
            raise error
        return images.mean((1, 2, 3))

    return reward


UNSCORED: dict[str, Callable[..., object]] = {
    "nan": lambda images, prompts: torch.tensor(values(images, prompts, math.nan)),
    "inf": lambda images, prompts: torch.tensor(values(images, prompts, math.inf)),
    "minus inf": lambda images, prompts: values(images, prompts, -math.inf),
    "nan in a list": lambda images, prompts: values(images, prompts, math.nan),
    "nan in float64": lambda images, prompts: torch.tensor(values(images, prompts, math.nan), dtype=torch.float64),
    "beyond float32": lambda images, prompts: torch.tensor(values(images, prompts, 1e300), dtype=torch.float64),
    "None in a list": lambda images, prompts: [None if math.isnan(v) else v for v in values(images, prompts, math.nan)],
    "left out of a list": lambda images, prompts: [v for v in values(images, prompts, math.nan) if not math.isnan(v)],
    "refused": raising(UserError("the judge's answer has no score")),
    "an exception": raising(ZeroDivisionError("division by zero")),
    "exit": raising(SystemExit(1)),
    "an assertion": raising(AssertionError()),
}


@pytest.mark.parametrize("case", UNSCORED)
def test_one_bad_picture_costs_one(case: str, tmp_path: Path) -> None:
    scorer = skipping(UNSCORED[case], tmp_path / "failed", retries=1)
    scores, _ = scorer.submit(PICTURES, PROMPTS).result()
    assert scores.flatten().isnan().tolist() == [False, True, False, False]
    assert scores.flatten()[[0, 2, 3]].tolist() == pytest.approx([MEANS[0], MEANS[2], MEANS[3]])
    said = scorer.say_unscored()
    assert "reward mine: " in said
    assert f"its pictures and prompts are in {tmp_path / 'failed'}" in said
    assert "\n" not in said
    (line,) = (tmp_path / "failed" / "prompts.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert (kept["prompt"], kept["text"]) == ("bad", "x")
    assert kept["problem"].startswith("reward mine: ")
    assert [path.name for path in (tmp_path / "failed").glob("*.png")] == ["0000.png"]
    assert scorer.say_unscored() == "", "it was said"


@pytest.mark.parametrize("case", UNSCORED)
def test_stop_is_what_it_was(case: str) -> None:
    with pytest.raises(UserError):
        Scorer(one_reward(UNSCORED[case], retries=0)).submit(PICTURES, PROMPTS).result()


def test_a_number_that_is_not_finite_says_how_to_go_on() -> None:
    with pytest.raises(UserError, match=r"1 of 4 values are not finite .*scoring.on_failure skip"):
        Scorer(one_reward(UNSCORED["nan"])).submit(PICTURES, PROMPTS).result()


def test_good_pictures_of_a_batch_with_a_nan_are_not_asked_about_again() -> None:
    calls = []

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> object:
        calls.append(len(images))
        return values(images, prompts, math.nan)

    skipping(counted, retries=2).submit(PICTURES, PROMPTS).result()
    assert calls == [4]


def test_what_failed_as_a_whole_is_asked_picture_by_picture_once() -> None:
    calls = []

    def counted(images: Tensor, prompts: Sequence[Prompt]) -> object:
        calls.append(len(images))
        raise ConnectionError("refused")

    scorer = skipping(counted, retries=2)
    scores, _ = scorer.submit(PICTURES, PROMPTS).result()
    assert calls == [4, 4, 4, 1, 1, 1, 1]
    assert scores.isnan().all()
    assert "ConnectionError: refused" in scorer.say_unscored()


def test_a_reward_of_several_may_skip_by_itself() -> None:
    shared = ScoringConfig()
    skip = RewardTerm(on_failure="skip", retries=0).scoring(shared)
    assert (skip.on_failure, skip.max_skipped, shared.on_failure) == ("skip", 0.1, "stop")
    flaky = WeightedReward(as_reward(raising(ValueError("x"))), scoring=skip)
    strict = WeightedReward(as_reward(raising(ValueError("x"))), scoring=RewardTerm(retries=0).scoring(shared))
    good = WeightedReward(as_reward(lambda images, prompts: images.mean((1, 2, 3))))
    scores, _ = Scorer(RewardSet({"good": good, "flaky": flaky})).submit(PICTURES, PROMPTS).result()
    assert scores.isnan().tolist() == [[False, False], [False, True], [False, False], [False, False]]
    with pytest.raises(UserError, match="reward strict: failed 1 times"):
        Scorer(RewardSet({"flaky": flaky, "strict": strict})).submit(PICTURES, PROMPTS).result()


def test_a_call_that_never_returns_stops_all_the_same() -> None:
    """It is still in there: nothing else may be asked of that reward."""
    release = threading.Event()

    def hangs(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        release.wait(60)
        return images.mean((1, 2, 3))

    try:
        with pytest.raises(UserError, match="timed out"):
            skipping(hangs, retries=0, timeout=0.05).submit(PICTURES, PROMPTS).result()
    finally:
        release.set()


def test_the_end_of_a_run_is_no_failure() -> None:
    with pytest.raises(StopNow):
        skipping(raising(StopNow())).submit(PICTURES, PROMPTS).result()


def test_the_folder_holds_the_last_ones_of_each_process(tmp_path: Path) -> None:
    """Two processes write beside each other, and an earlier failure's pictures do not stay among the new."""
    for process in (0, 1):
        scorer = Scorer(one_reward(raising(ValueError("x")), retries=0), tmp_path, process)
        with pytest.raises(UserError, match=rf"are in .*process-{process}-\*"):
            scorer.submit(PICTURES[: 4 - process], PROMPTS[: 4 - process]).result()
    again = Scorer(one_reward(raising(ValueError("x")), retries=0), tmp_path, 0)
    with pytest.raises(UserError):
        again.submit(PICTURES[:2], PROMPTS[:2]).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "process-0-0000.png",
        "process-0-0001.png",
        "process-0-prompts.jsonl",
        "process-1-0000.png",
        "process-1-0001.png",
        "process-1-0002.png",
        "process-1-prompts.jsonl",
    ]
    assert len((tmp_path / "process-1-prompts.jsonl").read_text().splitlines()) == 3
