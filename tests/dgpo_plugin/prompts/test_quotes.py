"""Texts in quotes: of every language, and no apostrophe or inch taken for one."""

from __future__ import annotations

import pytest

from dgpo_plugin.prompts.quotes import first_quoted, quoted_texts

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "prompt",
    [
        'A sign "Open" here',
        "A sign “Open” here",
        "Ein Schild „Open“ am Tor",
        "Szyld „Open” na drzwiach",
        "Une enseigne « Open » ici",
        "Ein Schild »Open« hier",
        "Kyltti »Open» ovessa",
        "En skylt ”Open” här",
        "看板に「Open」と書かれた店",
        "看板に『Open』と書かれた店",
        "一个招牌写着“Open”的店",
        "一个招牌写着'Open'的店",
        '一个招牌写着"Open"的店',
        "一本书《Open》",
        "A sign 'Open' here",
        "A sign ‘Open’ here",
        "Ein Schild ‚Open‘ hier",
        "A sign ‹Open› here",
        "A sign ›Open‹ here",
        "A sign `Open` here",
        "A sign `Open' here",
        "A sign ``Open'' here",
        "A sign ''Open'' here",
        "A sign ＂Open＂ here",
        "A sign ❝Open❞ here",
        "A sign ｢Open｣ here",
        'A sign “Open" here',
        'A sign "Open” here',
        "A sign (“Open”)",
        'A sign that says"Open"',
        "A sign:'Open'",
        'A sign " Open "',
    ],
)
def test_quotes_of_all_languages(prompt: str) -> None:
    assert first_quoted(prompt) == "Open"
    assert quoted_texts(prompt) == ("Open",)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "the dog's bowl",
        "the dogs' and cats' bowls",
        "rock 'n' roll",
        "fish ’n’ chips",
        "a shop of the ’90s and the '80s",
        "don’t and won’t",
        "Hawai‘i and Qur’an",
        "five o'clock, six o‘clock",
        'A 12" TV',
        'A 24" TV beside a 30" TV',
        'A 5"x7" photo',
        'A 1/2" pipe and a ¾" pipe',
        "A 12″ ruler, 3′ long",
        "A man of 5'10\"",
        'A sign "Open',
        "A sign “Open",
        'An empty "" and " "',
    ],
)
def test_apostrophes_measures_and_what_is_never_closed_are_no_quotes(prompt: str) -> None:
    assert first_quoted(prompt) == ""
    assert quoted_texts(prompt) == ()


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('A 12" ruler with "Hello"', "Hello"),
        ("A 12” ruler with “Hello”", "Hello"),
        ("A 12″ ruler with “Hello”", "Hello"),
        ("A 3' x 6' banner \"Go\"", "Go"),
        ('8.5"x11" paper, "Hi"', "Hi"),
        ('A box with "12" Pizza"', '12" Pizza'),
        ('A "Size 9" shoe', "Size 9"),
        ('"Open 24" over a 12" ruler', "Open 24"),
        ('A "24" and an "Open" sign', "24"),
        ("A dog's bowl that says 'Rex'", "Rex"),
        ("A sign 'Don't Panic' here", "Don't Panic"),
        ("A sign ‘Don’t Panic’ here", "Don’t Panic"),
        ("saying “I’m here”, isn’t it", "I’m here"),
        ("L’enseigne « L’Étoile »", "L’Étoile"),
        ("o'clock 'Tea Time' o'clock", "Tea Time"),
        ("a sign 'Rock 'n' Roll'", "Rock 'n' Roll"),
        ("a sign ‘Rock ‘n’ Roll’", "Rock ‘n’ Roll"),
        ("招牌写着〈夜市〉", "夜市"),
        ('a sign \\"Open\\" copied out of JSON', "Open"),
        ("a sign \\'Open\\' copied out of a program", "Open"),
        ("the '90s shop with \"Sale\" of the '80s", "Sale"),
    ],
)
def test_beside_and_inside_quotes_apostrophes_and_measures_stay_what_they_are(prompt: str, text: str) -> None:
    assert first_quoted(prompt) == text
    assert quoted_texts(prompt)[0] == text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("“He said ‘Hi’ loudly”", "He said ‘Hi’ loudly"),
        ("‘He said “Hi” loudly’", "He said “Hi” loudly"),
        ("\"She said 'Yes'\"", "She said 'Yes'"),
        ("「彼は『はい』と」", "彼は『はい』と"),
        ("“a “b” c”", "a “b” c"),
        ("«a «b» c»", "a «b» c"),
    ],
)
def test_of_quotes_in_quotes_the_outer_one_counts(prompt: str, text: str) -> None:
    assert first_quoted(prompt) == text
    assert quoted_texts(prompt) == (text,)


def test_of_several_texts_the_published_reward_takes_the_first_between_straight_double_quotes() -> None:
    for prompt in ('A "Big Sale" and "more"', 'A “neon” sign "Big Sale"', "A 'retro' sign “Big Sale” and “more”"):
        assert first_quoted(prompt) == "Big Sale"
    assert quoted_texts("A “neon” sign \"Big Sale\", 'today' and `now`") == ("neon", "Big Sale", "today", "now")
