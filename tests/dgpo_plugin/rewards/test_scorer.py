"""A reward that is slow, dies or lies: tried again, then refused with its inputs saved."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.load import load_config
from dgpo_plugin.rewards import scorer as scoring
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.build import build_trainer
from tests.conftest import SMALL, one_reward

pytestmark = pytest.mark.fast

PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a red circle", {"n": 1}), Prompt("two")]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RETRY_PAUSE", 0.0)


class Flaky:
    """Fails so many times, then gives each picture its mean."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("refused")
        return images.mean((1, 2, 3))


def test_a_reward_that_recovers_is_not_noticed() -> None:
    flaky = Flaky(2)
    values, seconds = Scorer(one_reward(flaky, retries=2)).submit(PICTURES, PROMPTS).result()
    assert torch.allclose(values, PICTURES.mean((1, 2, 3))[:, None])
    assert flaky.calls == 3
    assert seconds >= 0


def test_a_reward_that_does_not_recover_is_refused_and_its_inputs_saved(tmp_path: Path) -> None:
    scorer = Scorer(one_reward(Flaky(99), retries=2), tmp_path / "failed")
    with pytest.raises(
        UserError, match=r"failed 3 times, last with ConnectionError: refused; its pictures and prompts"
    ):
        scorer.submit(PICTURES, PROMPTS).result()
    lines = (tmp_path / "failed" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": "a red circle", "n": 1}, {"prompt": "two"}]
    with Image.open(tmp_path / "failed" / "0001.png") as saved:
        assert saved.size == (8, 8)


class Slow:
    """Its first call waits until it is let go; notes how many are inside at once."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.inside, self.most, self.calls = fails, 0, 0, 0
        self.lock, self.release, self.ended = threading.Lock(), threading.Event(), threading.Event()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        with self.lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
            first = self.calls == 1
        assert self.release.wait(60)
        with self.lock:
            self.inside -= 1
        self.ended.set()
        if self.fails and first:
            raise ConnectionError("too late")
        return images.mean((1, 2, 3))

    def let_go(self, seconds: float) -> None:
        """In the place of the pause before a retry."""
        self.release.set()
        assert self.ended.wait(60)


@pytest.fixture
def hanging() -> Iterator[Slow]:
    reward = Slow()
    yield reward
    reward.release.set()


def test_a_call_that_was_given_up_puts_nothing_back(
    hanging: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there when it began is long gone when it ends: another folder, another random number."""
    before = set(threading.enumerate())
    with pytest.raises(UserError, match="timed out once"):
        Scorer(one_reward(hanging, retries=0, timeout=0.05)).submit(PICTURES, PROMPTS).result()
    late = [thread for thread in threading.enumerate() if thread not in before]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    hanging.release.set()
    for thread in late:
        thread.join(60)
    assert late
    assert Path.cwd() == tmp_path.resolve()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("fails", "calls"), [(False, 1), (True, 2)])
def test_a_late_call_is_waited_for(fails: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer counts; if it fails, it is tried again, when it has ended."""
    late = Slow(fails=fails)
    monkeypatch.setattr("dgpo_plugin.rewards.scorer.time.sleep", late.let_go)
    values, _ = Scorer(one_reward(late, retries=2, timeout=2)).submit(PICTURES, PROMPTS).result()
    assert torch.allclose(values, PICTURES.mean((1, 2, 3))[:, None])
    assert (late.calls, late.most) == (calls, 1)


@pytest.mark.parametrize(("retries", "times"), [(0, "once"), (1, "twice"), (5, "twice")])
def test_a_reward_that_never_answers_is_given_up(hanging: Slow, retries: int, times: str, tmp_path: Path) -> None:
    """And nothing else enters it, though more micro-batches are waiting."""
    scorer = Scorer(one_reward(hanging, retries=retries, timeout=0.05), tmp_path / "failed")
    first, second = (scorer.submit(PICTURES, PROMPTS) for _ in range(2))
    with pytest.raises(UserError, match=f"timed out {times}, no answer in 0.05 s .*raise scoring.timeout") as raised:
        first.result()
    assert "\n" not in str(raised.value)
    assert "its pictures and prompts are in" in str(raised.value)
    with pytest.raises(UserError, match="an earlier call has not returned"):
        second.result()
    assert (hanging.calls, hanging.most) == (1, 1)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_reward_that_calls_exit_is_one_that_failed(kind: type[BaseException]) -> None:
    def leaves(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise kind("bye\nbye")

    with pytest.raises(UserError, match=rf"failed 2 times, last with {kind.__name__}: bye$"):
        Scorer(one_reward(leaves, retries=1, timeout=60)).submit(PICTURES, PROMPTS).result()


def test_nonsense_is_not_asked_for_twice(tmp_path: Path) -> None:
    calls = []

    def lies(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(1)
        return torch.full((len(images),), float("nan"))

    with pytest.raises(UserError, match="2 of 2 values are not finite.*its pictures and prompts are in"):
        Scorer(one_reward(lies, retries=5), tmp_path / "failed").submit(PICTURES, PROMPTS).result()
    assert len(calls) == 1


def test_rewards_are_computed_while_the_next_images_are_sampled() -> None:
    """A reward that waits for the second micro-batch to be decoded could not end otherwise."""
    second = threading.Event()

    class Patient:
        calls = 0

        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            self.calls += 1
            if self.calls == 1:
                assert second.wait(60), "the second micro-batch was not sampled meanwhile"
            return images.mean((1, 2, 3))

    trainer = build_trainer(
        load_config("shapes", [*SMALL, "training.micro_batch_size=4"]), rewards=one_reward(Patient())
    )
    decode, decoded = trainer.policy.model.decode, []

    def noted(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        if len(decoded) == 2:
            second.set()
        return decode(latents)

    trainer.policy.model.decode = noted  # type: ignore[method-assign]
    next(trainer.iterations())
    assert decoded == [4, 4]


def test_a_slow_reward_delays_by_what_sampling_does_not_cover() -> None:
    """Of two calls of a quarter second, the first runs beside the second micro-batch's sampling."""

    def slow(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(0.25)
        return images.mean((1, 2, 3))

    trainer = build_trainer(load_config("shapes", [*SMALL, "training.micro_batch_size=4"]), rewards=one_reward(slow))
    record = next(trainer.iterations())
    assert record["reward_seconds"] >= 0.5
    assert record["reward_wait_seconds"] < record["reward_seconds"]


def test_a_judge_that_does_not_answer_keeps_no_program_from_ending() -> None:
    """Python waits for threads that are no daemons, and for those of pools, before it ends."""
    before, answer = set(threading.enumerate()), threading.Event()

    def waits(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        answer.wait(60)
        return images.mean((1, 2, 3))

    scorer = Scorer(one_reward(waits, timeout=60))
    first, second = scorer.submit(PICTURES, PROMPTS), scorer.submit(PICTURES, PROMPTS)
    started = set(threading.enumerate()) - before
    assert started
    assert all(thread.daemon for thread in started)
    answer.set()
    assert torch.equal(first.result()[0], second.result()[0])


def test_a_full_disk_does_not_hide_what_the_reward_said(tmp_path: Path) -> None:
    (tmp_path / "failed").touch()  # a file in the folder's place
    with pytest.raises(UserError, match=r"last with ConnectionError: refused; its pictures and prompts could not be"):
        Scorer(one_reward(Flaky(9), retries=0), tmp_path / "failed").submit(PICTURES, PROMPTS).result()
