"""What is called held-out is held out: null and overlaps are told, in the output, the header and the card."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.training.evaluation import HELD_OUT, call_prompts
from tests.dgpo_plugin.training.test_short_runs import tiny, trained

pytestmark = pytest.mark.fast

TRAIN = ["a red circle", "a blue square", "two green triangles"]


@pytest.mark.parametrize(
    ("evaluated", "called"),
    [
        (["a green circle", "a red square"], HELD_OUT),
        (None, "training prompts"),
        (TRAIN, "training prompts"),
        (TRAIN[:1], "training prompts"),
        (["a green circle", "a red circle"], "2 prompts, 1 trained on"),
        (["a green circle", "  A red   Circle"], "2 prompts, 1 trained on"),
        (["a green circle", "a red circle", "a red circle"], "3 prompts, 2 trained on"),
    ],
)
def test_prompts_are_called_what_they_are(evaluated: list[str] | None, called: str) -> None:
    prompts = None if evaluated is None else [Prompt(text) for text in evaluated]
    assert call_prompts([Prompt(text) for text in TRAIN], prompts) == called


@pytest.mark.parametrize(
    ("held_out", "name", "told"),
    [
        (["a green circle", "a red square"], "held-out reward", ""),
        (
            ["a green circle", "a blue square"],
            "reward on 2 prompts, 1 trained on",
            "1 of 2 prompts are in prompts.train",
        ),
        (TRAIN, "reward on training prompts", "3 of 3 prompts are in prompts.train"),
        (None, "reward on training prompts", ""),
    ],
)
def test_output_header_and_card_say_so(held_out: list[str] | None, name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(TRAIN))
    source = "null"
    if held_out is not None:
        (tmp_path / "held.txt").write_text("\n".join(held_out))
        source = str(tmp_path / "held.txt")
    changes = (f"prompts.train={tmp_path / 'train.txt'}", f"prompts.held_out={source}", "training.iterations=1")
    said = trained(tmp_path / "run", tiny(*changes))
    assert f"{name} of the base: " in said
    assert f"{name} 0." in said
    assert told in said
    assert ("held-out reward" in said) == (name == "held-out reward")
    file = read_adapter(tmp_path / "run" / "adapter.safetensors")
    called = "held-out prompts" if name == "held-out reward" else name.removeprefix("reward on ")
    assert file.header["dgpo.reward_measured_on"] == called
    card = AdapterCard.of(file)
    assert card.reward_before.endswith(f"({called})")
    assert card.reward_after.endswith(f"({called})")
