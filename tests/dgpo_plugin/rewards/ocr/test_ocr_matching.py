"""How near what was read is to what was asked for, by the published rule and by the forgiving one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_plugin.rewards.ocr.matching import (
    alike,
    edit_distance,
    forgiving_closeness,
    forgiving_exact,
    published_closeness,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("read", "wanted", "value"),
    [
        ("the FRESH bread today", "Fresh Bread", 1),
        ("", "word", 0),
        ("completely different", "word", 0),
        ("wort", "word", 0.75),
    ],
)
def test_both_forget_spaces_case_and_what_stands_around(read: str, wanted: str, value: float) -> None:
    assert published_closeness(read, [wanted]) == forgiving_closeness(read, [wanted]) == value


@pytest.mark.parametrize(
    ("read", "wanted", "published"),
    [
        ("Sérénity", "Serenity", 0.75),
        ("SÉRÉNITY", "Serenity", 0.75),
        ("Hellø", "Hello", 0.8),
        ("Mınt", "Mint", 0.75),
        ("Café Sérénity", "Café Serenity", 10 / 12),
        ("séa cafe séréníty", "Serenity", 0),
        ("Don't Panic", "Don’t Panic", 0.9),
        ("“Carpe Diem'", "“Carpe Diem”", 10 / 11),
        ("Carpe Diem", "“Carpe Diem”", 9 / 11),
        ("Hallo“", "„Hallo“", 6 / 7),
        ("<Salut>", "‹Salut›", 5 / 7),
        ("A-Z", "A–Z", 2 / 3),
        ("Tea--Cakes", "Tea—Cakes", 7 / 9),
        ("−5°", "-5°", 2 / 3),
        ("100℃", "100°C", 0.6),
        ("100°℃", "100°C", 0.8),
        ("100ºC", "100°C", 0.8),
        ("A＆B", "A & B", 2 / 3),
        ("Ｏｐｅｎ", "Open", 0),
        ("Wait...", "Wait…", 0.4),
        ("1/2 Price", "½ Price", 0.5),
        ("5x6", "5 × 6", 2 / 3),
        ("Nº9", "№ 9", 0),
        ("H2O", "H₂O", 2 / 3),
        ("ﬁne", "fine", 0.5),
        ("cafe\u0301", "café", 0.5),
        ("STRASSE", "Straße", 4 / 6),
        ("AErø", "Ærø", 1 / 3),
        ("II Mulino", "Il Mulino", 7 / 8),
        ("Hill Billy III", "Hill Billy Ill", 10 / 12),
        ("Page 1O1", "Page 101", 6 / 7),
        ("istanbul", "İstanbul", 8 / 9),
        ("NY", "♥ NY", 2 / 3),
        ("I\u00a0♥\ufe0f\u200bNY", "I ♥ NY", 0.25),
        ("Hola!", "¡Hola!", 5 / 6),
    ],
)
def test_the_forgiving_rule_forgives_what_looks_alike_and_what_a_reader_makes_up(
    read: str, wanted: str, published: float
) -> None:
    assert forgiving_closeness(read, [wanted]) == 1
    assert forgiving_closeness(f"shop {read} today", [wanted]) == 1
    assert published_closeness(read, [wanted]) == pytest.approx(published)


@pytest.mark.parametrize(
    ("read", "wanted", "value"),
    [
        ("cafe", "café", 0.75),
        ("cafè", "café", 0.75),
        ("Hello", "Hellø", 0.8),
        ("はか", "ばか", 0.5),
        ("항", "한", 0),
        ("Dont Panic", "Don't Panic", 0.9),
        ("AB", "A&B", 2 / 3),
        ("Hella", "Hello", 0.8),
        ("Sign", "Slgn", 0.75),
        ("100C", "100°C", 0.8),
        ("$5.00", "€5.00", 0.8),
        ("1924", "1925", 0.75),
    ],
)
def test_the_forgiving_rule_does_not_forgive_another_letter_or_a_missing_mark(
    read: str, wanted: str, value: float
) -> None:
    assert forgiving_closeness(read, [wanted]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        ("OpenLate", 1),
        ("LateOpen", 1),
        ("tonight late and open", 1),
        ("Open", 0.5),
        ("OpenLote", 7 / 8),
        ("", 0),
    ],
)
def test_of_several_texts_each_must_be_found_wherever_it_stands(read: str, value: float) -> None:
    assert forgiving_closeness(read, ["Open", "Late"]) == published_closeness(read, ["Open", "Late"]) == value


def test_a_text_that_is_asked_for_twice_must_be_there_twice() -> None:
    assert forgiving_closeness("Open", ["Open", "Open"]) == 0.5
    assert forgiving_closeness("Open open", ["Open", "Open"]) == 1
    assert forgiving_closeness("Open late", ["Open", "Open Late"]) == pytest.approx(8 / 12)


words = st.text(alphabet="abc", max_size=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words, words, words)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, b) == edit_distance(a, b, lambda one, other: one == other)


def test_edit_distance_in_numbers() -> None:
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("text", "plain"), [("Don’t  Panic", "Don'tPanic"), ("—–-", "-"), ("♥★🎉", ""), (" \u200b", "")]
)
def test_what_is_taken_for_the_same(text: str, plain: str) -> None:
    assert alike(text) == plain


@pytest.mark.parametrize(
    ("read", "wanted", "exact"),
    [
        ("CAT", ["CAT"], True),
        ("c at", ["CAT"], True),
        ("'CAT'", ["CAT"], True),
        ("“Don´t Panic”", ["don't panic"], True),
        ("H0TE1", ["HOTEL"], False),
        ("H0TEL", ["HOTEL"], True),
        ("THE CAT", ["CAT"], False),
        ("CATS", ["CAT"], False),
        ("CA", ["CAT"], False),
        ("", ["CAT"], False),
        ("world hello", ["Hello", "World"], True),
        ("world hello you", ["Hello", "World"], False),
        ("Sérénity", ["Serenity"], True),
        ("Serenity", ["Sérénity"], False),
    ],
)
def test_exact_is_all_that_was_asked_for_and_nothing_else(read: str, wanted: list[str], exact: bool) -> None:
    assert forgiving_exact(read, wanted) is exact


@given(st.text(max_size=12), st.text(min_size=1, max_size=6))
def test_what_is_exact_is_close_too(read: str, wanted: str) -> None:
    assert forgiving_closeness(read, [wanted]) == 1 or not forgiving_exact(read, [wanted])
