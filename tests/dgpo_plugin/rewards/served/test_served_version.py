"""A served reward's version is that of what it is made of, not of where that lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards.served.server import identity

pytestmark = pytest.mark.fast


def version(**options: Any) -> str:
    return identity("clipscore", RewardTerm(options=options), ScoringConfig())[1]


def test_weights_in_another_place_are_the_same_version(tmp_path: Path) -> None:
    for name, text in (("a.pt", "weights"), ("b.pt", "weights"), ("c.pt", "others")):
        (tmp_path / name).write_text(text)
    first, second, third = (version(weights=str(tmp_path / name)) for name in ("a.pt", "b.pt", "c.pt"))
    assert first == second != third
    assert version(weights="openai/a") != version(weights="openai/b")
