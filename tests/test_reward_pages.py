"""What docs/rewards*.md and README.md say of rewards: their configurations load, their code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.rewards import REWARDS, load_rewards
from tests.conftest import REQUIRED, shapes_run

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("rewards.md", "rewards-remote.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def configurations() -> list[dict[str, Any]]:
    """Every YAML block of the pages, and every line of README that says rewards."""
    blocks = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]
    lines = re.findall(r"^rewards: .*$", README, flags=re.MULTILINE)
    return [values for text in (*blocks, *lines) for values in yaml.safe_load_all(text)]


@pytest.mark.parametrize("values", configurations(), ids=str)
def test_a_configuration_of_the_pages_loads(values: dict[str, Any]) -> None:
    config = parse_config({**REQUIRED, **values}, "the page")
    for label, term in config.rewards.items():
        assert term.name(label).startswith("mine.py:") or term.name(label) in REWARDS


def test_the_pages_have_configurations() -> None:
    assert len(configurations()) >= 9


def test_the_reward_of_the_page_scores_and_checks(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(# mine.py.*?)```", PAGES[0], flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    rewards = load_rewards(shapes_run(rewards=f"{tmp_path / 'mine.py'}:Sharpness").rewards)
    assert rewards.title == "sharpness 2"
    picture = torch.zeros(1, 3, 4, 4)
    picture[..., ::2] = 1
    assert rewards.score(picture, [Prompt("a dog")]).tolist() == [[1.0]]
    with pytest.raises(Exception, match="prompt 'a dog in fog' asks for fog"):
        rewards.check([Prompt("a dog in fog")])
