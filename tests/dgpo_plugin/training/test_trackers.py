"""Trackers by names that match nothing are told: accelerate leaves them out without a word."""

from __future__ import annotations

from pathlib import Path

import accelerate.tracking
import pytest

from dgpo_plugin.common.errors import UserError
from tests.dgpo_plugin.training.test_short_runs import tiny, trained

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", "logging.trackers: wandb is not installed; install"), ("wandbb", "logging.trackers: .*wandbb")],
)
def test_a_tracker_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match=message):
        trained(tmp_path / "run", tiny("training.iterations=1", f"logging.trackers=[{name}]"))
