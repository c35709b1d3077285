"""The number in a judge's text: the right one or an error, never another."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgpo_plugin.rewards.served.answer_score import Scale, matched_score, score_in
from dgpo_plugin.rewards.served.answer_text import without_thinking

pytestmark = pytest.mark.fast

FIVE = Scale(1, 5)
CASES = Path(__file__).parents[3] / "cases" / "answers" / "judge.tsv"

PLAIN = [
    "I judge on a scale of 1 to 5.\n\nFinal Score: 4",
    "On a 5-point scale:\nFinal Score: 4",
    "Final Score: <4>",
    "Final Score: 4\nI would say the two dogs match.",
    "Score: 4/5\nConfidence: 3/5",
    "Final Score: 4/5\n\nThe image shows 3 cats.",
    "Final Score: 4 (out of 5)\nTwo of the dogs are missing.",
    "4 points out of 5",
    "(1 = worst, 5 = best)\nFinal Score: 4",
    "Final Score: 4\n\nThe picture actually shows three of the dogs.",
    "Final Score: 4",
    "Final score: 4",
    "FINAL SCORE: 4",
    "Final Score:4",
    "Final Score : 4",
    "Final Score = 4",
    "Final Score 4",
    "final_score: 4",
    "Final Score: 4.",
    "Final Score: 4.0",
    "Final Rating: 4",
    "Score: 4",
    "Overall score: 4",
    "The final score is 4.",
    "So the final score is 4",
    "Final Score for the image: 4",
    "**Final Score:** 4",
    "**Final Score**: **4**",
    "- Final Score: 4",
    "3. Final Score: 4",
    "Answer: Final Score: 4",
    "## Final Score\n4",
    "Final Score:\n\n**4**\n",
    "`Final Score: 4`",
    "```\nFinal Score: 4\n```",
    "| Alignment | 3 |\n| Final Score | 4 |",
    "Final Score: $\\boxed{4}$",
    "\\boxed{4}",
    "Final Score: [4]",
    "Final Score\uff1a\u30104\u3011",
    "Final Score\uff1a\u300c4\u300d",
    "Final Score: +4",
    "Final Score: 4</s>",
    "### Final Score: 4 ###",
    "**Final** Score: 4",
    "The final score is: 4",
    "Rating: [[4]]",
    "[[4]]",
    "Final Score: (4)",
    "Final Score: <4>",
    "<answer>4</answer>",
    "<score>4</score>",
    "<|begin_of_box|>4<|end_of_box|>",
    "4",
    "**4**",
    "4.",
    "Final Score: 4/5",
    "4/5",
    "Final Score: 4 / 5",
    "Final Score: 4.0/5.0",
    "Final Score: 4 out of 5",
    "Final Score: 4 (out of 5)",
    "Final Score: 4 of 5",
    "Final Score: 4 (on a scale of 1 to 5)",
    "Final Score (1-5): 4",
    "Final Score: 4 points",
    "Final Score: 4 \N{WHITE MEDIUM STAR}",
    "Final Score: 4, because the colors are right",
    "Final Score: 4. The picture shows 3 dogs.",
    "A good picture. Final Score: 4",
    "A good picture.**Final Score: 4**",
    "Alignment Score: 3\nQuality Score: 5\nFinal Score: 4",
    "circle (object): 1\nFinal Score: 4",
    "1. Alignment: good\n2. Quality: fine\nFinal Score: 4",
    '"Final Score": 4',
    'Final Score: "4"',
    '"Final Score: 4"',
    '{"score": 4}',
    '{"Final Score": "4/5"}',
    '```json\n{"score": 4}\n```',
    'Here it is:\n{"alignment": 3, "quality": 5, "final_score": 4}',
    '{"result": {"score": 4}}',
    '[{"score": 4}]',
    '{"score": 4, "max_score": 5}',
    '{"text in the picture": "Final Score: 5", "score": 4}',
    "{'score': 4}",
    "\uff26\uff49\uff4e\uff41\uff4c\u3000\uff33\uff43\uff4f\uff52\uff45\uff1a\uff14",
    "Final Score\uff1a\uff14",
    "Final Score: \u0664",
    "Final\u00a0Score:\u200b4",
    'The sign shows "Final Score: 5". Final Score: 4',
    "The sign shows 'Final Score: 5', but it's dark.\nFinal Score: 4",
    'The 12" pan is there.\nFinal Score: 4',
    "Final Score (1 = worst, 5 = best): 4",
    "Final Score: **4**/5 stars.",
    "Final Score: 4 \u2013 the dog is red",
    "The sign shows \u201cFinal Score: 5\u201d.\nFinal Score: 4",
    "> Final Score: 5\n\nThat is a quotation.\nFinal Score: 4",
]
UNCLEAR = [
    "On a scale from 0 to 10:\nFinal Score: 4",
    "I rate on a 10-point scale.\n\nFinal Score: 4",
    "Scale of 1–7.\nFinal Score: 4",
    'I use a scale from 1 to 100.\n{"score": 4}',
    "Ratings range from 1 to 10.\nFinal Score: 4",
    "(1 = worst, 10 = best)\nFinal Score: 4",
    "Out of 10:\nFinal Score: 4",
    "Final Score (%): 4",
    "4 points out of 10",
    "Final Score: 4\nEdit: 3",
    "Final Score: 4\n\nUpdate: after another look, 3.",
    "Final Score: 4\nI would give it a 3.",
    "Final Score: <4",
    "Final Score: < 4",
    "Final Score: 4. Hmm, on reflection I'd say 3.",
    "Final Score: 4\n\nActually, 3.",
    "Final Score: 4\n\nNo, the hands are wrong: 3",
    "Final Score: 4\nI would lower it to 3.",
    "",
    "It is lovely.",
    "Final Score: x",
    "Final Score: four",
    "Final Score: IV",
    "Final Score: N/A",
    "Final Score: NaN",
    "Final Score: inf",
    "Final Score: -3",
    "Final Score: 0",
    "Final Score: 45",
    "Final Score -4",
    # a range, or more than one
    "Final Score: 4-5",
    "Final Score: 4 - 5",
    "Final Score: 4\u20135",
    "Final Score: 4~5",
    "Final Score: 4..5",
    "Final Score: 4 to 5",
    "Final Score: 4 or 5",
    "Final Score: between 3 and 4",
    "Final Score: 4 \u00b1 1",
    "4-5",
    "Final Score: 3 or Final Score: 4",
    "Final Score: 3\nFinal Score: 4",
    "Score: 3\nScore: 4",
    "Final Score: ~~4~~ 3",
    "Final Score: 4 -> 3",
    "Final Score: 4. Wait, Final Score: 3",
    "Final Score: 4\nWait, it is 3.",
    "Final Score: 4, maybe five",
    "Final Score: 1. Good 2. Bad",
    "Final Score:\n1. Good\n2. Bad",
    # another scale
    "Final Score: 80/100",
    "Final Score: 4/10",
    "4/10",
    "Final Score: 4 out of 10",
    "Final Score: 3 (of 10)",
    "Final Score (out of 10): 4",
    "Final Score: 4 on a scale from 1 to 10",
    "Final Score: 4 on a scale of 0 to 5",
    "Final Score: 4%",
    "Final Score: 4/5/5",
    '{"score": 80, "max": 100}',
    '{"score": 4, "scale": "1-10"}',
    # a longer number
    "Final Score: 4,500",
    "Final Score: 4.5.1",
    "Final Score: 4,5,1",
    "Final Score: 4e1",
    "Final Score: 4. 5",
    "Final Score: 4\u00bd",
    "Final Score: 4 1/2",
    "Final Score: 4\u00b2",
    "Final Score: 4 and a half",
    "Final Score: 4 point five",
    "Final Score: 4th",
    "Final Score: 4+",
    "Final Score: >4",
    # no score of this picture
    "4 dogs",
    "Score for alignment: 4\nScore for quality: 3",
    "Alignment Score: 4",
    "<alignment>4</alignment>",
    "Example: Final Score: 3",
    "e.g. Final Score: 3",
    "I would not say Final Score: 5",
    "I'm sorry, but I can't assist with that.",
    "Final Score: 5\nI cannot score it.",
    "Final Score: 1\nI'm unable to evaluate the image.",
    # quoted from the picture
    'The picture shows text reading "Final Score: 5". I cannot score it.',
    "The picture shows text reading Final Score: 5.",
    "The text reads \u201cFinal Score: 5\u201d.",
    "The sign says 'Final Score: 5'",
    "The sign says `Final Score: 5`",
    "On it: \u300cFinal Score: 5\u300d",
    "> Final Score: 5\nThat is all.",
    "The sign reads:\nFinal Score: 5",
    "The sign reads:\n\n**Final Score: 5**",
    "The text says:\nHELLO\nFinal Score: 5",
    'It has the words "GAME OVER\nFinal Score: 5',
    # JSON that does not say it
    '{"score": NaN}',
    '{"score": -4}',
    '{"score": null}',
    '{"score": true}',
    '{"score": "four"}',
    '{"score": [4, 5]}',
    '{"score": {"alignment": 4}}',
    '{"score": 4, "score": 3}',
    '{"alignment": 4, "quality": 3}',
    '{"alignment": {"score": 4}, "quality": {"score": 4}}',
    '{"score": 1' + "0" * 400 + "}",
]


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_form_is_read(text: str) -> None:
    assert score_in(text, FIVE) == 4


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_is_unclear_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        score_in(text, FIVE)


def cases() -> list[tuple[str, str]]:
    """What people met: an answer, and what it is worth."""
    with CASES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[0].replace("\\n", "\n"), row[1]) for row in rows[1:]]


@pytest.mark.parametrize(("text", "expected"), cases())
def test_cases_that_people_met(text: str, expected: str) -> None:
    try:
        value = score_in(without_thinking(text), FIVE)
    except ValueError:
        assert "error" in expected
    else:
        assert value == float(expected.split()[0])


@pytest.mark.parametrize(
    ("text", "scale", "value"),
    [
        ("Final Score: 4,5", FIVE, 4.5),
        ("Final Score: 80/100", Scale(0, 100), 80),
        ("Final Score: 80%", Scale(0, 100), 80),
        ("Final Score: .5", Scale(0, 1), 0.5),
        (".5", Scale(0, 1), 0.5),
        ("Final Score: 7.5/10", Scale(0, 10), 7.5),
        ("Final Score: -3", Scale(-5, 5), -3),
        ("Final Score: \N{MINUS SIGN}3", Scale(-5, 5), -3),
    ],
)
def test_other_scales_and_decimals(text: str, scale: Scale, value: float) -> None:
    assert score_in(text, scale) == value


@settings(max_examples=300, deadline=None, derandomize=True)
@example(before="", after="\u2044 10")
@given(
    before=st.text(alphabet=" *_#.:\n([{\"'>|-", max_size=6),
    after=st.text(alphabet=" *.,:;/-+~%5\n)]}|\u00bd", max_size=5),
)
def test_whatever_stands_around_it_makes_no_other_number(before: str, after: str) -> None:
    """4 where only decoration follows; what continues the number in any way is 4 and something, or an error."""
    try:
        value = score_in(f"{before}Final Score: 4{after}", FIVE)
    except ValueError:
        return
    assert value == (4.5 if re.match(r"[.,]5(?!\d)", after) else 4)
    assert not re.match(r" *[-+~:\u00bd] *5|%|\u00bd", after)


@pytest.mark.parametrize(
    ("text", "pattern", "scale", "value"),
    [
        ("Score: 7", r"Score: (\d+)", Scale(0, 10), 7),
        ("Score: 7/10", r"Score: (\d+)", Scale(0, 10), 7),
        ("Score: 7\u5206", r"Score: (\d+)", Scale(0, 10), 7),
        ("Score: 7. Score: 7.0", r"Score: (\d+(?:\.\d+)?)", Scale(0, 10), 7),
        ("Score: 7,5", r"Score: ([\d,.]+)", Scale(0, 10), 7.5),
        ("85 %", r"^(\d+) ?%$", Scale(0, 100), 85),
        ("Score: 85%", r"Score: (\d+)", Scale(0, 100), 85),
        ("Score: 7 of 9 things", r"Score: (\d+) of 9", Scale(0, 10), 7),
        ("Score: 7.5", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 7,5", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 7-8", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 7 or 8", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 7\u00bd", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 45", r"Score: (\d)", Scale(0, 10), None),
        ("Score: 4/5", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: \uff14\uff0f\uff15", r"Score: (\d+)", Scale(0, 10), None),
        ("Score: 4%", r"Score: (\d+)", Scale(0, 10), None),
        ("-4", r"(\d+)", Scale(0, 10), None),
        ("Score: 1_0", r"Score: (\S+)", Scale(0, 10), None),
        ("Score: nan", r"Score: (\S+)", Scale(0, 10), None),
        ("Score: 3, Score: 4", r"Score: (\d+)", Scale(0, 10), None),
        ("Score:", r"Score:(\d+)?", Scale(0, 10), None),
    ],
)
def test_a_pattern_of_ones_own_cuts_no_number(text: str, pattern: str, scale: Scale, value: float | None) -> None:
    if value is not None:
        assert matched_score(text, re.compile(pattern), scale) == value
        return
    with pytest.raises(ValueError, match=r"."):
        matched_score(text, re.compile(pattern), scale)


@pytest.mark.parametrize(
    "text",
    [
        "score" + "*" * 20000,
        "Final Score " * 3000,
        "[" * 5000,
        '"' * 9999,
        "final " * 5000 + "x",
        "cannot score " + "it " * 5000 + "x",
    ],
    ids=range(6),
)
def test_a_text_on_which_a_careless_pattern_would_never_end(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        score_in(text, FIVE)
