"""Hostile inputs, a few of every kind, and every one that ever was a finding (``tests/cases/fuzz``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.campaign import tried
from tests.fuzz.cases import Case, Outcome, judged
from tests.fuzz.kinds import KINDS

KEPT = Path(__file__).parents[1] / "cases" / "fuzz"
COUNT = {"results": 20, "checkpoint": 40}
"""Cases of a kind; 40 where nothing is said."""


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_end_well_or_in_one_line(kind: str) -> None:
    verdicts: Counter[str] = Counter()
    for number in range(COUNT.get(kind, 40)):
        case = KINDS[kind][0](Random(f"{kind} {number}"))
        verdict, wrong = tried(case)
        assert not wrong, f"case {number}, {case.program} {case.arguments}: {wrong}"
        verdicts[verdict] += 1
    assert verdicts["accepted"], "else the parser alone is tried"
    assert verdicts["refused"]


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.json")), ids=lambda file: file.stem)
def test_what_was_found_once_is_not_found_again(file: Path) -> None:
    verdict, wrong = tried(Case.from_json(file.read_text(encoding="utf-8")))
    assert not wrong, f"{verdict}: {wrong}"


@pytest.mark.fast
def test_a_case_is_the_same_from_its_file() -> None:
    case = KINDS["adapter"][0](Random(0))
    assert Case.from_json(case.as_json()) == case


@pytest.mark.fast
@pytest.mark.parametrize(
    ("outcome", "right"),
    [
        (Outcome(0, "", ""), True),
        (Outcome(2, "", "error: run.yaml: mend it\n"), True),
        (Outcome(2, "", "error: a\nb\n"), False),
        (Outcome(2, "", f"error: {'x' * 4000}\n"), False),
        (Outcome(2, "", "error: \x1b[31m\n"), False),
        (Outcome(1, "", "Aborted!\n"), False),
        (Outcome(1, "", "", "Traceback ..."), False),
        (Outcome(-9, "", ""), False),
    ],
)
def test_what_is_right_is_told_from_what_is_not(outcome: Outcome, right: bool) -> None:
    assert (judged(Case("yaml", "dgpo", (), {}), outcome) == "") is right
