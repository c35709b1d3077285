"""Configurations that people had, and the line that each gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config

CASES = Path(__file__).parents[2] / "cases" / "configs"


@pytest.mark.fast
def test_ones_own_model_without_prompts_does_not_train_on_a_toys() -> None:
    with pytest.raises(UserError) as refused:
        load_config(str(CASES / "own-model-without-prompts.yaml"))
    assert "prompts.train is missing; name a .txt or .jsonl file" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
