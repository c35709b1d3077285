"""A reward in a process of its own: the same scores, and whatever happens there ends no more than an attempt."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import files_hash
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.config.load import load_config, reward_terms
from dgpo_plugin.rewards import RewardSet, WeightedReward, isolated, load_reward, load_rewards
from dgpo_plugin.rewards import scorer as scoring
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.build import build_trainer
from tests.conftest import SMALL

pytestmark = pytest.mark.fast

PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a", {"n": 0.5}, "a.txt:1"), Prompt("b")]
OWN = """
import os, random, signal, sys, time
import numpy as np
import torch
from dgpo_plugin.rewards import Reward
from helper import nap

torch.set_grad_enabled(False)


class Own(Reward):
    title = "own 1"

    def __call__(self, images, prompts):
        print("printed")
        what = prompts[0].text
        if what == "sleep":
            nap(60)
        if what == "die":
            os._exit(3)
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "leave":
            sys.exit("bye")
        if what == "pair":
            return images.mean((1, 2, 3)), {}
        if what == "once":
            mark = prompts[0].metadata["file"]
            if not os.path.exists(mark):
                open(mark, "w").close()
                os._exit(1)
        if what == "draw":
            return [float(torch.rand(())) + random.random(), np.random.rand()]
        if what == "pid":
            return [float(os.getpid())] * len(images)
        return images.mean((1, 2, 3)) + prompts[0].metadata.get("n", 0)

    def check(self, prompts):
        return [f"{p.place} is bad" for p in prompts if p.text == "bad"]
"""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RETRY_PAUSE", 0.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "helper.py").write_text("from time import sleep as nap\n")
    (folder / "mine.py").write_text(OWN)
    return folder / "mine.py"


@pytest.fixture(scope="module")
def rewards(file: Path) -> RewardSet:
    term = RewardTerm(reward=f"{file}:Own", isolate=True, timeout=60, retries=0)
    return load_rewards({"mine": term})


def score(rewards: RewardSet, *prompts: Prompt) -> Tensor:
    return Scorer(rewards).submit(PICTURES, prompts).result()[0]


def ask(rewards: RewardSet, what: str, **metadata: str) -> list[float]:
    return score(rewards, Prompt(what, metadata), Prompt("b"))[:, 0].tolist()


def test_scores_are_those_of_a_reward_in_this_process(rewards: RewardSet, file: Path) -> None:
    here = load_rewards({"mine": RewardTerm(reward=f"{file}:Own")})
    assert torch.equal(score(rewards, *PROMPTS), score(here, *PROMPTS))
    assert (rewards.title, rewards.sha256) == (here.title, files_hash([f"{file}:Own"]))
    for drawn in range(2):  # random numbers too
        torch.manual_seed(drawn)
        theirs = ask(rewards, "draw")
        torch.manual_seed(drawn)
        assert theirs == ask(here, "draw")
    assert ask(rewards, "pid") == pytest.approx(ask(rewards, "pid"))
    assert ask(rewards, "pid")[0] != float(os.getpid())
    with pytest.raises(UserError, match="reward mine: a.txt:2: a.txt:2 is bad"):
        rewards.check([Prompt("a"), Prompt("bad", place="a.txt:2")])


def test_what_it_prints_is_not_taken_for_an_answer(rewards: RewardSet, capfd: pytest.CaptureFixture[str]) -> None:
    ask(rewards, "a")
    assert "printed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("die", "failed 1 times, last with ChildError: its process ended with exit code 3"),
        ("crash", "failed 1 times, last with ChildError: its process was ended by SIGSEGV"),
        ("leave", r"failed 1 times, last with ChildError: SystemExit: bye \(at .*mine.py:24\)"),
        ("pair", r"returned 2 things, as in \(scores, info\)"),
    ],
)
def test_what_happens_there_is_one_line_and_the_next_call_works(rewards: RewardSet, what: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^reward mine: {said}") as caught:
        ask(rewards, what)
    assert "\n" not in str(caught.value)
    assert ask(rewards, "a") == PICTURES.mean((1, 2, 3)).tolist()


def test_an_attempt_in_which_it_dies_is_made_again(rewards: RewardSet, tmp_path: Path) -> None:
    again = WeightedReward(rewards.members["mine"].reward, scoring=ScoringConfig(retries=1))
    assert ask(RewardSet({"mine": again}), "once", file=str(tmp_path / "mark")) == PICTURES.mean((1, 2, 3)).tolist()


def test_a_time_out_ends_its_process_and_the_next_call_starts_another(file: Path) -> None:
    rewards = load_rewards({"mine": RewardTerm(reward=f"{file}:Own", isolate=True, timeout=4, retries=0)})
    before = int(ask(rewards, "pid")[0])
    with pytest.raises(
        UserError, match="failed 1 times, last with TimeoutError: no answer in 4 s, its process was ended"
    ):
        ask(rewards, "sleep")
    after = int(ask(rewards, "pid")[0])
    assert after != before
    del rewards  # and with the reward it ends too
    gc.collect()
    for pid in (before, after):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere", "ModuleNotFoundError while loading it: No module named 'nowhere'"),
        ("import os; os._exit(9)", "its process ended with exit code 9"),
    ],
)
def test_one_that_cannot_be_loaded_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text + "\n")
    with pytest.raises(UserError, match=said):
        load_reward("mine", RewardTerm(reward=f"{tmp_path / 'mine.py'}:Own", isolate=True))


def test_after_an_edit_its_process_is_not_started_with_another_reward(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os\ndef own(images, prompts):\n    os._exit(1)\n")
    rewards = load_rewards({"mine": RewardTerm(reward=f"{file}:own", isolate=True, retries=1)})
    file.write_text("def own(images, prompts):\n    return [0.0] * len(images)\n")
    with pytest.raises(UserError, match="reward mine: its file was changed while the run went on"):
        ask(rewards, "a")


def test_it_is_a_field_of_a_reward_and_part_of_no_other(file: Path) -> None:
    terms, shared = reward_terms([f"{file}:Own"], [f"rewards.{file}:Own.isolate=true"])
    assert terms[f"{file}:Own"].isolate
    assert terms[f"{file}:Own"].scoring(shared) == shared == ScoringConfig()


def test_a_run_with_it_is_the_run_without(file: Path) -> None:
    records = []
    for isolate in ("false", "true"):
        config = load_config("shapes", [*SMALL, f"rewards={{mine: {{reward: '{file}:Own', isolate: {isolate}}}}}"])
        records.append(next(build_trainer(config).iterations()))
    numbers = [{key: value for key, value in record.items() if "seconds" not in key} for record in records]
    assert numbers[0] == numbers[1]


def test_its_process_ends_with_a_parent_that_was_killed_though_it_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(BaseException):
        pass

    def leave(code: int) -> None:
        assert code == 0
        raise Ended

    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(Ended):
        isolated._end_with(7)  # noqa: SLF001
