"""The pages that are made of the code's own descriptions are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.metrics import METRICS
from tools.reference_pages import pages

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("path", list(pages()), ids=lambda path: path.name)
def test_the_page_is_what_the_code_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "run: python tools/reference_pages.py --write"


def test_they_name_every_field_and_every_key() -> None:
    configuration, metrics = pages().values()
    for section, fields in load_config("shapes").model_dump(mode="json").items():
        assert f"## `{section}`" in configuration
        # The keys of `rewards` are labels; its fields are those of each.
        for field in next(iter(fields.values())) if section == "rewards" else fields or ():  # pairs are none here
            assert f"| `{field}` |" in configuration, f"{section}.{field}"
    for metric in METRICS:
        assert f"| `{metric.key}`" in metrics
