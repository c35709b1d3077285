"""The alarm for reward hacking where the harness puts it: it goes off in shapes-vivid, and not in a default cell."""

from __future__ import annotations

import pytest

from dgpo_bench.preset import load_preset
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.guard import Alarm

GUARDED = ("shapes", "shapes-unguided", "shapes-2", "shapes-2-unguided", "words", "words-unguided", "shapes-vivid")


def alarms(preset_name: str, iterations: int, every: int) -> tuple[Alarm, ...]:
    """What the guard of the challenger's cell has said after some iterations, looking so often."""
    preset, task = load_preset(preset_name)
    changes = {"model": {"precision": "fp32"}, "training": {"guard": {"every": every}}}
    trainer = build_trainer(preset.run_config(task, preset.challenger, 0, changes))
    assert trainer.guard is not None
    running = trainer.iterations(share_done=lambda: trainer.iteration / iterations)
    assert len(list(running)) == iterations
    assert trainer.guard.state.look == iterations
    return trainer.guard.state.alarms


@pytest.mark.slow
def test_it_goes_off_where_the_reward_is_hacked() -> None:
    """Rich colors are had by spoiling what is drawn, which the untrained metric sees."""
    found = alarms("shapes-vivid", iterations=6, every=2)
    assert any(alarm.name == "shapes" for alarm in found)


@pytest.mark.slow
def test_it_does_not_in_a_default_cell_of_as_many_iterations() -> None:
    assert alarms("shapes", iterations=6, every=2) == ()


@pytest.mark.fast
@pytest.mark.parametrize("name", GUARDED)
def test_every_cell_of_these_has_one_that_never_stops(name: str) -> None:
    """Equal budgets are what cells are compared by."""
    preset, task = load_preset(name)
    for entry in preset.algorithms:
        guard = preset.run_config(task, entry, 0).training.guard
        assert guard is not None
        assert not guard.stop


@pytest.mark.fast
@pytest.mark.parametrize(
    ("guided", "unguided"), [(name, f"{name}-unguided") for name in ("shapes", "shapes-2", "words")]
)
def test_guided_and_unguided_ask_for_the_same(guided: str, unguided: str) -> None:
    first, second = (load_preset(name) for name in (guided, unguided))
    assert first[1] == second[1]
    assert first[0].usual == second[0].usual
    assert second[0].guidance == 1


@pytest.mark.fast
@pytest.mark.parametrize(("searched", "unseen"), [("shapes-2", "words"), ("shapes-2-unguided", "words-unguided")])
def test_words_takes_what_was_found_on_shapes(searched: str, unseen: str) -> None:
    assert load_preset(searched)[0].algorithms == load_preset(unseen)[0].algorithms
