"""How long a comparison will take, from timings that are made up."""

from __future__ import annotations

import pytest

from dgpo_bench.forecast import (
    Timing,
    base_evaluations,
    best_evaluations,
    cell_evaluations,
    cell_pictures,
    forecast,
    guard_evaluations,
    guard_pictures,
)
from dgpo_bench.plan import Plan
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import sampled_sets
from tests.bench.small_plans import two_seeds_of

pytestmark = pytest.mark.fast


def two_seeds() -> Plan:
    return two_seeds_of(["dgpo", "flow-grpo"], jobs=2)


def test_a_forecast_adds_up_what_was_timed() -> None:
    """4 cells of 1,000 evaluations, two at once, 5 + 1 + .2 each; the base, whose pictures are known, besides."""
    timing, plan = Timing(start=5, training=0.001, sampling=0.0005, evaluating=400), two_seeds()
    missing = [("dgpo", 0), ("flow-grpo", 0), ("zero", 0), ("dgpo", 1)]
    found = forecast(plan, missing, timing)
    assert found.seconds == pytest.approx(4 * 6.2 / 2)
    assert (found.runs, found.training, found.sampling) == (4, pytest.approx(1), pytest.approx(0.5))
    of_base = base_evaluations(plan, sampled_sets(plan.task, plan.size))
    with_base = forecast(plan, missing, timing, base=True)
    assert with_base.seconds - found.seconds == pytest.approx((5 + 0.0005 * of_base) / 2)


def test_evaluations_of_measuring_are_counted_by_picture_step_and_guidance() -> None:
    """10 steps at guidances 1, 2 and 3 are 10, 20 and 20 evaluations a picture."""
    plan = two_seeds()
    sets = sampled_sets(plan.task, plan.size)
    pictures = {name: 2 * len(each.prompts) for name, each in sets.items()}
    validation = pictures.pop("validation")
    assert base_evaluations(plan, sets) == (validation + sum(pictures.values())) * 50
    wider = plan.model_copy(update={"size": plan.size.model_copy(update={"base_validation_images": 7})})
    assert base_evaluations(wider, sets) == (validation / 2 * 7 + sum(pictures.values())) * 50
    assert cell_evaluations(wider, sets) == cell_evaluations(plan, sets)
    curve = 2 * sum(len(each.curve) for each in sets.values())
    assert 0 < curve < sum(pictures.values())
    assert cell_evaluations(plan, sets) == 2 * curve * 20 + validation * 50 + sum(pictures.values()) * 20


def test_the_best_checkpoint_costs_validation_pictures_at_every_evaluation_and_another_end() -> None:
    """Two evaluations at guidance 3 (20 evaluations a picture); at the end 1 and 2 are left to draw, twice."""
    plan = two_seeds().with_best(True)
    sets = sampled_sets(plan.task, plan.size)
    pictures = {name: 2 * len(each.prompts) for name, each in sets.items()}
    validation, curve = pictures.pop("validation"), 2 * sum(len(each.curve) for each in sets.values())
    tested = sum(pictures.values())
    assert cell_evaluations(plan, sets) == 2 * (curve + validation) * 20 + 2 * (validation * 30 + tested * 20)
    assert cell_pictures(plan, sets) == 2 * (curve + validation) + 2 * (validation * 2 + tested)
    assert best_evaluations(plan, sets) == cell_evaluations(plan, sets) - cell_evaluations(two_seeds(), sets)
    # With one evaluation the last is the best, whose validation pictures are drawn once as ever.
    once = plan.model_copy(update={"size": plan.size.model_copy(update={"schedule": ()})})
    assert cell_evaluations(once, sets) == cell_evaluations(once.with_best(False), sets)
    assert cell_pictures(once, sets) == cell_pictures(once.with_best(False), sets)


def test_a_finished_adapter_has_no_best_checkpoint() -> None:
    plan = two_seeds().with_best(True).model_copy(update={"adapters": {"mine": "mine.safetensors"}})
    assert not plan.keeps_best
    assert best_evaluations(plan, sampled_sets(plan.task, plan.size)) == 0


@pytest.mark.parametrize("name", ["shapes", "shapes-2", "words"])
def test_the_best_of_eight_is_a_cheap_control_of_a_default_size_and_one_that_trains_is_not(name: str) -> None:
    """Below a tenth of all denoiser evaluations, so that it can be there unasked."""
    preset, task = load_preset(name)
    spent = {}
    for control in ("none", "zero", "best-of-n"):
        sized = preset.sized("default", evaluations=100_000, controls=control)
        plan = Plan.of(name, preset, task, "default", sized, preset.usual, jobs=1)
        sets = sampled_sets(task, sized)
        spent[control] = base_evaluations(plan, sets) + len(plan.cells) * (100_000 + cell_evaluations(plan, sets))
    assert 1 < spent["best-of-n"] / spent["none"] < 1.1 < spent["zero"] / spent["none"]


def test_a_guard_draws_the_base_and_then_at_every_look() -> None:
    """Every 20 iterations 8 prompts, 4 pictures of each, at 10 steps with guidance 3: 20 evaluations a picture."""
    preset, task = load_preset("shapes")
    config = preset.run_config(task, "dgpo", 0, {"training": {"guard": {"every": 20, "prompts": 8, "images": 4}}})
    assert [guard_pictures(config, count) for count in (0, 19, 20, 53)] == [32, 32, 64, 96]
    assert guard_evaluations(config, 53) == 96 * 20
    many = preset.run_config(task, "dgpo", 0, {"training": {"guard": {"prompts": 10**6, "images": 4}}})
    validation = sampled_sets(task, preset.sizes["full"].model_copy(update={"validation_prompts": 10**6}))["validation"]
    assert guard_pictures(many, 0) == 4 * len(validation.prompts)
    assert guard_pictures(preset.run_config(task, "dgpo", 0, {"training": {"guard": None}}), 53) == 0
