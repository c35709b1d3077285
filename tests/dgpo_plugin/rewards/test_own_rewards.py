"""A reward of one's own cannot hurt the run: what it returns, raises and changes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import as_reward, checked_rewards, load_reward
from dgpo_plugin.rewards import scorer as scoring
from dgpo_plugin.rewards.scorer import Scorer
from tests.conftest import one_reward
from tests.dgpo_plugin.common.test_user_file import CASES, MEDDLING, everybodys

pytestmark = pytest.mark.fast

PICTURES, PROMPTS = torch.full((2, 3, 8, 8), 0.25), [Prompt("ab", {"n": [1]}), Prompt("abcd")]


def score(function: Callable[..., Any]) -> list[float]:
    return checked_rewards(as_reward(function), PICTURES, PROMPTS, "mine").tolist()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "RETRY_PAUSE", 0.0)


@pytest.mark.parametrize(
    "returned",
    [
        [0.5, 1.5],
        (0.5, 1.5),
        np.array([0.5, 1.5]),
        np.array([0.5, 1.5], dtype=np.float16),
        torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
        torch.tensor([0.5, 1.5], requires_grad=True),
        [torch.tensor(0.5), torch.tensor([1.5])],
        [np.float64(0.5), np.float32(1.5)],
    ],
    ids=str,
)
def test_numbers_in_any_shape_of_one_each_are_taken(returned: Any) -> None:
    assert score(lambda images, prompts: returned) == [0.5, 1.5]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, r"returned nothing \(None\); it must return one number for each image"),
        ((torch.zeros(2), {}), r"returned 2 things, as in \(scores, info\)"),
        ((np.zeros(2), [{}, {}]), r"returned 2 things, as in \(scores, info\)"),
        ((torch.zeros(2), torch.zeros(2)), r"returned 2 things, as in \(scores, info\)"),
        ({"reward": [1.0, 2.0]}, "an object of class dict"),
        ({0: 1.0, 1: 2.0}, "an object of class dict"),
        ("ab", "an object of class str"),
        (["a", "b"], "returned a list with 'a' in it"),
        ([torch.tensor(0.5), None], "returned a list with None in it"),
        (np.array(["a", "b"]), "an object of class ndarray"),
        (iter([1.0, 2.0]), "an object of class list_iterator"),
        (0.5, r"returned shape \(\) for 2 images"),
        (torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images"),
        (torch.zeros(2, 2), r"returned shape \(2, 2\) for 2 images"),
        (torch.zeros(3), r"returned shape \(3,\) for 2 images"),
        ([], r"returned shape \(0,\) for 2 images"),
        (torch.zeros(2, dtype=torch.complex64), "returned complex numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_told_at_the_first_attempt(returned: Any, said: str) -> None:
    calls = []

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Any:
        calls.append(1)
        return returned

    with pytest.raises(UserError, match=f"^reward mine: .*{said}"):
        Scorer(one_reward(reward, retries=2)).submit(PICTURES, PROMPTS).result()
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_coroutine_is_no_number() -> None:
    async def reward(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        return [0.0, 0.0]

    with pytest.raises(UserError, match="an object of class coroutine"):
        score(reward)


def test_the_case_that_returns_scores_and_info() -> None:
    reward = load_reward(f"{CASES / 'scores_and_info.py'}:reward")
    with pytest.raises(UserError, match=r"returned 2 things, as in \(scores, info\); it must return one number"):
        checked_rewards(reward, PICTURES, PROMPTS, "mine")


@pytest.mark.parametrize("line", MEDDLING)
def test_what_a_call_changes_of_everybodys_is_put_back(line: str) -> None:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        exec(line, {"torch": torch, "np": np, "random": random, "os": os})
        return images.mean((1, 2, 3))

    torch.manual_seed(3)
    torch.randint(2**32, ())  # what a call begins with
    before = everybodys()
    torch.manual_seed(3)
    assert score(reward) == [0.25, 0.25]
    assert everybodys() == before


@pytest.mark.parametrize("line", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"])
def test_a_call_that_changes_a_default_is_refused_by_name(line: str) -> None:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        exec(line, {"torch": torch})
        return images.mean((1, 2, 3))

    with pytest.raises(UserError, match="reward mine: changes torch's default d.* and the model samples beside it"):
        score(reward)
    assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float32, "cpu")


def test_a_reward_that_draws_draws_anew_in_each_call_and_the_same_in_a_run_that_is_done_again() -> None:
    def noise(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        return [float(torch.rand(())) + random.random(), np.random.rand()]

    def twice() -> list[list[float]]:
        torch.manual_seed(5)
        return [score(noise), score(noise)]

    first, second = twice()
    assert first != second
    assert [first, second] == twice()


def test_a_reward_gets_copies_of_prompts_too() -> None:
    def takes(images: Tensor, prompts: list[Prompt]) -> Tensor:
        for prompt in prompts:
            prompt.metadata.get("n", [0]).append(2)
            prompt.metadata.clear()  # type: ignore[attr-defined]
        prompts.clear()
        return images.mean((1, 2, 3))

    score(takes)
    assert [Prompt("ab", {"n": [1]}), Prompt("abcd")] == PROMPTS


RAISES = {
    "raise ValueError('no')": "ValueError: no",
    "import sys; sys.exit('bye')": "SystemExit: bye",
    "raise GeneratorExit": "GeneratorExit",
    "class Own(BaseException): pass\n    raise Own('a\\nb')": "Own: a",
    "class Own(Exception):\n        def __str__(self): raise SystemExit\n    raise Own": "Own: its message cannot be "
    "read",
}


@pytest.mark.parametrize("body", RAISES)
def test_whatever_a_reward_raises_is_one_line_with_its_place(body: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def reward(images, prompts):\n    {body}\n")
    line = 1 + f"    {body}".count("\n") + 1
    place = rf"{RAISES[body]} \(at {file}:{line}\)"
    with pytest.raises(UserError, match=f"^reward mine: failed 2 times, last with {place}$"):
        Scorer(one_reward(load_reward(f"{file}:reward"), retries=1)).submit(PICTURES, PROMPTS).result()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    told = CliRunner().invoke(main, ["score", str(tmp_path / "a.png"), "--reward", f"{file}:reward", "--prompt", "a"])
    assert told.exit_code == 2
    assert f"{RAISES[body]} (at {file}:{line})" in " ".join(told.stderr.split())


def scored(folder: Path, body: str, *more: str) -> Result:
    """``dgpo score`` of two pictures of 6 x 8 by a reward with that body."""
    (folder / "mine.py").write_text(f"def reward(images, prompts):\n    {body}\n")
    for name in "ab":
        Image.new("RGB", (6, 8)).save(folder / f"{name}.png")
    asked = ["score", *(str(folder / f"{name}.png") for name in "ab"), "--reward", f"{folder / 'mine.py'}:reward"]
    return CliRunner().invoke(main, [*asked, *(more or ("--prompt", "a"))])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return images.mean((1, 2, 3)), {}", "returned 2 things, as in (scores, info)"),
        ("return images.mean((1, 2, 3))[:1]", "returned shape (1,) for 2 images"),
    ],
)
def test_dgpo_score_tells_what_is_no_number_a_picture(body: str, said: str, tmp_path: Path) -> None:
    result = scored(tmp_path, body)
    assert result.exit_code == 2
    assert f"mine.py:reward: {said}" in result.stderr


def test_ctrl_c_in_dgpo_score_is_the_users(tmp_path: Path) -> None:
    assert scored(tmp_path, "raise KeyboardInterrupt").exit_code == 130


def test_dgpo_score_tells_all_bad_prompts_with_their_lines_before_its_first_picture(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "objects": []}\n\n{"prompt": "b"}\n')
    result = scored(tmp_path, "...", "--reward", "shapes", "--prompts", str(tmp_path / "p.jsonl"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"reward shapes: {tmp_path / 'p.jsonl'}:3: prompt 'b' has no metadata" in result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise SystemExit(3)", r"SystemExit while loading it: 3 \(at .*mine.py:3\)"),
        ("raise GeneratorExit('x')", r"GeneratorExit while loading it: x \(at .*mine.py:3\)"),
        ("import torch; torch.set_default_dtype(torch.float16)", "changes torch's default dtype"),
    ],
)
def test_a_class_that_cannot_be_made_is_one_line_with_its_place(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"class Mine:\n    def __init__(self):\n        {line}\n    def __call__(self, i, p): ...\n")
    with pytest.raises(UserError, match=f"reward {file}:Mine: {said}"):
        load_reward(f"{file}:Mine")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("line", MEDDLING)
def test_what_the_making_of_a_reward_changes_of_everybodys_is_put_back(line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, random, torch, numpy as np\n"
        f"class Mine:\n    def __init__(self):\n        {line}\n    def __call__(self, i, p): ...\n"
    )
    before = everybodys()
    load_reward(f"{file}:Mine")
    assert everybodys() == before
