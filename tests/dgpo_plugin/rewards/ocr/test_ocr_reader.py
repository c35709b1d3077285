"""Text found in pictures of all shapes, and the order that it is read in."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.rewards.ocr.reader import TextReader, reader_of, reading_orders
from dgpo_plugin.rewards.ocr.reward import OcrExactReward, OcrReward
from tests.dgpo_plugin.rewards.ocr.drawn_words import placed, plainly

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader()


def box(left: float, top: float, width: float = 80, height: float = 30, slant: float = 0) -> list[list[float]]:
    corners = np.array([(left, top), (left + width, top), (left + width, top + height), (left, top + height)])
    turn = np.array([[np.cos(slant), np.sin(slant)], [-np.sin(slant), np.cos(slant)]])
    return (corners @ turn).tolist()


@pytest.mark.parametrize("lower", [0, 5, 9, 10, 11, 14, -9, -10, -14])
@pytest.mark.parametrize("slant", [0, 0.3, -0.3])
def test_words_of_one_row_are_read_from_left_to_right_however_uneven_they_stand(lower: float, slant: float) -> None:
    boxes = [box(220, 100 + lower, slant=slant), box(10, 100, slant=slant), box(120, 100 + lower / 2, slant=slant)]
    assert reading_orders(np.array(boxes, np.float32)) == [[1, 2, 0]]


def test_words_of_large_letters_may_be_far_apart_and_still_be_a_row() -> None:
    boxes = [box(500, 160, 300, 200), box(10, 100, 300, 200)]
    assert reading_orders(np.array(boxes, np.float32)) == [[1, 0]]


def test_rows_of_small_letters_are_two_rows_however_near_they_are() -> None:
    boxes = [box(60, 100, 50, 8), box(0, 109, 50, 8), box(0, 100, 50, 8), box(60, 109, 50, 8)]
    assert reading_orders(np.array(boxes, np.float32)) == [[2, 0, 1, 3], [2, 1, 0, 3]]


def test_nothing_is_read_in_no_order() -> None:
    assert reading_orders(np.zeros((0, 4, 2), np.float32)) == [[]]


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (placed(1024, 1024, 20, ("Exit", 380, 650)), "Exit"),
        (placed(1536, 1536, 20, ("Fresh Bread", 1200, 70)), "Fresh Bread"),
        (placed(64, 64, 16, ("Zoo", 10, 20)), "Zoo"),
        (placed(512, 64, 32, ("Serenity", 100, 12)), "Serenity"),
        (placed(2048, 128, 48, ("Mind the Gap", 900, 30)), "Mind the Gap"),
        (placed(128, 512, 22, ("Push", 20, 240)), "Push"),
        (plainly("Fresh Bread", 48, 0), "Fresh Bread"),
        (placed(512, 512, 40, ("Sold Out", 0, 0)), "Sold Out"),
        (plainly("7"), "7"),
    ],
    ids=["small-1024", "small-1536", "tiny", "thin", "very-thin", "tall", "no-margin", "corner", "digit"],
)
def test_words_are_found_in_pictures_of_all_shapes(reader: TextReader, picture: Tensor, text: str) -> None:
    assert reader.read(picture)[0].replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("lower", [0, 14])
def test_a_row_of_words_is_read_in_its_order(reader: TextReader, lower: int) -> None:
    picture = placed(512, 256, 40, ("Fresh", 30, 100 + lower), ("Bread", 300, 100))
    assert reader.read(picture) == ["FreshBread"]


def test_columns_are_read_as_rows_and_as_columns(reader: TextReader) -> None:
    picture = placed(512, 256, 40, ("Fresh", 20, 60), ("Daily", 320, 60), ("Bread", 20, 140), ("Baked", 320, 140))
    assert reader.read(picture) == ["FreshDailyBreadBaked", "FreshBreadDailyBaked"]


@pytest.mark.parametrize(
    ("lang", "said"),
    [("klingon", "no lang 'klingon'; known: "), ("koraen", "no lang 'koraen'; did you mean 'korean'\\?")],
)
def test_a_language_that_there_is_no_model_for(lang: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextReader(lang)


def test_languages_of_the_model_in_the_package_need_no_other(reader: TextReader) -> None:
    assert TextReader("fr").characters == reader.characters


def test_a_model_that_cannot_be_fetched_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("rapidocr.utils.download_file.requests.get", refuse)
    with pytest.raises(UserError, match=r"^lang korean: its model could not be loaded \(.*fetched on first use"):
        TextReader("korean")


def test_rewards_share_a_reader_of_their_language() -> None:
    """Each takes a third of a second to load and keeps nothing of a picture."""
    assert reader_of("") is reader_of("")
    assert OcrReward()._reader is OcrExactReward(texts="all")._reader is reader_of("")  # noqa: SLF001


def test_what_a_reader_says_does_not_hang_on_what_it_read_before(reader: TextReader) -> None:
    words = [plainly("HELLO"), plainly("FRESH BREAD")]
    first = [reader.read(picture) for picture in words]
    together: list[list[str]] = [[], []]

    def read(row: int) -> None:
        for _ in range(3):
            together[row] = reader.read(words[row])

    threads = [threading.Thread(target=read, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == first
