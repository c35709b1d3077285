"""The date of a result: now, or the one that a reproducible build asks for."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.provenance import creation_date

pytestmark = pytest.mark.fast


def test_the_date_is_now_or_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert creation_date() == "2023-11-14T22:13:20+00:00"
    for unset in ("", None):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "") if unset == "" else monkeypatch.delenv("SOURCE_DATE_EPOCH")
        apart = datetime.now(timezone.utc) - datetime.fromisoformat(creation_date())
        assert abs(apart.total_seconds()) < 60


@pytest.mark.parametrize("given", ["yesterday", "1.5", "9" * 30, "2023-11-14"])
def test_another_text_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
    with pytest.raises(UserError, match=f"^SOURCE_DATE_EPOCH={given}: no number of seconds"):
        creation_date()
