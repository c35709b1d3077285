"""An error for users is one line of bounded length, whatever it quotes."""

from __future__ import annotations

import pytest

from dgpo_plugin.common.errors import MOST_BYTES, UserError, cut_in_the_middle, prefixed, printable

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("letter", ["x", "é", "漢", "\n", "\x1b", "\ud800", "😀"])
def test_a_long_message_loses_its_middle(letter: str) -> None:
    said = str(UserError(f"run.yaml: {letter * 100_000}; mend it"))
    assert said.startswith("run.yaml: ")
    assert said.endswith("; mend it")
    assert " ... " in said
    assert len(said.encode()) <= MOST_BYTES
    assert said.isprintable()


def test_a_message_that_is_given_on_stays_whole_at_both_ends() -> None:
    with pytest.raises(UserError) as refused, prefixed("reward mine"):
        raise UserError("a" * 10_000 + "; mend it")
    assert str(refused.value).startswith("reward mine: aaa")
    assert str(refused.value).endswith("; mend it")
    assert str(refused.value).count(" ... ") == 1


def test_what_speaks_to_a_terminal_is_written_out() -> None:
    assert str(UserError("a\nerror: b\x1b[31m\u202e\ud800")) == r"a\nerror: b\x1b[31m\u202e\ud800"
    assert printable("an é and 漢 stay") == "an é and 漢 stay"


def test_a_short_text_is_not_cut() -> None:
    assert cut_in_the_middle("é" * 50, 100) == "é" * 50
