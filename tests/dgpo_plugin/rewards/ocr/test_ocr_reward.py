"""The reward ocr: words really read back, and what it says of prompts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.config.load import load_config
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.rewards import load_rewards
from dgpo_plugin.rewards.ocr.reward import OcrExactReward, OcrReward, requested_texts
from tests.dgpo_plugin.rewards.ocr.drawn_words import on_a_sign, placed, plainly

pytestmark = pytest.mark.fast
CASES = Path(__file__).parents[3] / "cases"


@pytest.fixture(scope="module")
def ocr() -> OcrReward:
    return OcrReward()


@pytest.fixture(scope="module")
def published() -> OcrReward:
    return OcrReward(matching="published")


@pytest.mark.parametrize(
    ("picture", "least"),
    [
        (on_a_sign("Fresh Bread"), 1.0),
        (on_a_sign("Fresh Bread", size=64), 0.8),  # smaller than the reader likes
        (on_a_sign("Fresh Bread", angle=20, busy=True), 1.0),
    ],
)
def test_words_that_are_there_are_read(ocr: OcrReward, published: OcrReward, picture: Tensor, least: float) -> None:
    prompts = [Prompt('A sign that reads "Fresh Bread"')]
    assert ocr(picture[None], prompts).item() >= least
    assert published(picture[None], prompts).item() >= least


def test_words_that_are_not_there_are_worth_little(ocr: OcrReward) -> None:
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    blank = torch.ones(3, 256, 256)
    pictures = torch.stack([noise, blank, on_a_sign("Closed"), on_a_sign("Fresh Broad")])
    values = ocr(pictures, [Prompt("a sign", {"text": "Fresh Bread"})] * 4)
    assert values[:2].tolist() == [0, 0]
    assert values[2] < 0.35
    assert values[3] == pytest.approx(0.9, abs=0.05)  # one letter of ten
    assert values.dtype == torch.float32


def cases() -> list[tuple[str, float]]:
    lines = (CASES / "answers" / "ocr.tsv").read_text(encoding="utf-8").splitlines()
    return [(text, float(value)) for text, value in list(csv.reader(lines, delimiter="\t"))[1:]]


@pytest.mark.parametrize(("text", "value"), cases())
def test_the_cases(ocr: OcrReward, text: str, value: float) -> None:
    assert ocr(plainly(text)[None], [Prompt(f'A sign that reads "{text}"')]).item() == value


@pytest.mark.parametrize(
    "text",
    [
        "Café Noir",
        "Señor Taco",
        "Temperature: −5°",
        "No Parking 8–6",
        "Coffee—Tea—Cakes",
        "“Carpe Diem”",
        "‹Salut›",
        "¡Hola!",
        "½ Price",
        "№ 9",
        "I ♥ NY",
        "50% OFF",
        "Room #12",
        "mail@post.org",
        "$4.99 only",
        "Q&A: yes/no?",
        "Il Mulino",
        "Straße 9",
        "Ærø",
        "7",
    ],
)
def test_a_plainly_drawn_text_scores_one(ocr: OcrReward, text: str) -> None:
    assert ocr(plainly(text)[None], [Prompt("a sign", {"text": text})]).item() == 1


def test_the_published_rule_takes_every_character_as_it_is(published: OcrReward) -> None:
    picture = plainly("Don’t Panic")
    values = published(torch.stack([picture] * 2), [Prompt('"Don’t Panic"'), Prompt('"Don\'t Panic"')])
    assert sorted(values.tolist()) == pytest.approx([0.9, 1])


def test_the_rule_stands_on_the_card(ocr: OcrReward, published: OcrReward) -> None:
    assert (ocr.title, published.title) == ("ocr (forgiving 1)", "ocr (published)")
    rewards = load_rewards({"ocr": RewardTerm(options={"texts": "all", "lang": "fr"})})
    assert rewards.title == "ocr (forgiving 1, all texts, fr)"


@pytest.mark.parametrize("preset", ["sd35-ocr", "sd35-ocr-unguided", "sd35-ocr-old-policy"])
def test_presets_with_published_settings_match_as_published(preset: str) -> None:
    assert load_config(preset).rewards["ocr"].options == {"matching": "published"}


def test_exactly_the_words_asked_for_are_worth_one_and_all_else_nothing() -> None:
    exact = load_rewards({"ocr-exact": RewardTerm()})
    assert exact.title == "ocr-exact (forgiving 1)"
    assert OcrExactReward(texts="all", lang="fr").title == "ocr-exact (forgiving 1, all texts, fr)"
    asked = [Prompt('a "Fresh Bread"')]
    for text, value in (("Fresh Bread", 1), ("Fresh Broad", 0), ("Fresh Bread today", 0), ("Closed", 0)):
        assert exact.score(plainly(text)[None], asked).tolist() == [[value]]
    with pytest.raises(UserError, match="no texts 'some'"):
        OcrExactReward(texts="some")  # type: ignore[arg-type]


# ---- what is asked for


def test_what_a_prompt_asks_for() -> None:
    assert requested_texts(Prompt('A "Big  Sale" and "more"')) == ("Big Sale",)
    assert requested_texts(Prompt("A “Big Sale” and “more”"), "all") == ("Big Sale", "more")
    assert requested_texts(Prompt('A "Big Sale"', {"text": "Other"})) == ("Other",)


@pytest.mark.parametrize("text", ["a red circle", 'A 12" TV', "the dog's bowl", 'A "♥"', 'An "" sign'])
def test_a_prompt_without_words(text: str) -> None:
    with pytest.raises(UserError, match='asks for no words; put them in "double quotes"'):
        requested_texts(Prompt(text))


@pytest.mark.parametrize("given", [24, ["Open"], True])
def test_metadata_that_are_no_text(given: object) -> None:
    with pytest.raises(UserError, match="as metadata text; write it as text, in quotes"):
        requested_texts(Prompt('A "Big Sale"', {"text": given}))


def test_all_texts_may_stand_anywhere() -> None:
    ocr = OcrReward(texts="all")
    picture = placed(512, 256, 40, ("Late", 30, 40), ("Open", 200, 160))
    assert ocr(picture[None], [Prompt("A door with 'Open' and “Late”")]).item() == 1
    assert ocr(picture[None], [Prompt("A door with 'Open' and “Never”")]).item() < 0.7


def test_the_curly_quoted_prompt_of_twenty_four_is_none_to_refuse(ocr: OcrReward) -> None:
    assert ocr.check(read_prompts(CASES / "prompts" / "one-bad-of-24.txt")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Привет",
            "asks for 'Привет', of which the model in rapidocr's package (it reads Latin, Chinese and Japanese) "
            "cannot read П р и в е т; set options.lang: eslav",
        ),
        ("안녕", "cannot read 안 녕; set options.lang: korean"),
        ("مرحبا", "set options.lang: arabic"),
        ("สวัสดี", "set options.lang: th"),
        ("नमस्ते", "set options.lang: devanagari"),
        ("Καλημέρα", "cannot read έ; set options.lang: el"),
        ("Việt Nam", "cannot read ệ; ask for other words"),
        ("Hello Мир", "cannot read М и р; set options.lang: eslav"),
        ("שלום", "ask for other words"),
    ],
)
def test_letters_that_cannot_be_read_are_refused(ocr: OcrReward, text: str, said: str) -> None:
    (told,) = ocr.check([Prompt(f"a sign “{text}”")])
    assert said in told


@pytest.mark.parametrize(
    "text", ["营业中", "營業中", "ようこそ", "カフェ", "Łódź", "Işık", "Ærø", "Þór", "α + β", "€5 – ½", "Party 🎉"]
)
def test_letters_that_can_be_read_are_not_refused(ocr: OcrReward, text: str) -> None:
    assert ocr.check([Prompt("a sign", {"text": text})]) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"matching": "publishd"}, "no matching 'publishd'; did you mean 'published'?"),
        ({"texts": "first"}, "no texts 'first'; known: published, all"),
        ({"lang": 3}, "no lang 3; known: "),
        ({"language": "fr"}, "has no option 'language'"),
    ],
)
def test_options_that_there_are_not(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rewards({"ocr": RewardTerm(options=options)})
    assert str(caught.value).startswith(f"reward ocr: {said}")
