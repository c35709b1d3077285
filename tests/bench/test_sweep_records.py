"""What a sweep is asked for: values, where the axes cross, which prompts."""

from __future__ import annotations

import math

import pytest

from dgpo_bench.asked import asked_sweep
from dgpo_bench.plan import Plan
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import VALIDATION, VALIDATION_SEED, few, swept_sets
from dgpo_bench.sweep_records import Setting, SweepPlan, parse_axis
from dgpo_bench.task import Task, load_task
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast


def sweep_plan(steps: list[int], strengths: list[float] | None = None, *, keep: bool = False) -> SweepPlan:
    preset, task = load_preset("shapes")
    plan = Plan.of("shapes", preset, task, "default", preset.sized("default", 1, controls="none"), [], jobs=1)
    return SweepPlan(
        plan=plan.model_copy(update={"keep_pictures": keep}),
        adapter="/home/jane/mine.safetensors",
        label="mine",
        adapter_sha256="ab",
        strengths=strengths or [0, 0.5, 1, 1.5],
        steps=steps,
        guidances=[1, 3],
        prompts=60,
    )


def test_values_are_read_in_any_order_and_rise() -> None:
    assert parse_axis("--strengths", "1.5, 0,0.25", float, 0, math.inf) == [0, 0.25, 1.5]
    assert parse_axis("--steps", "40,10", int, 1, 1000) == [10, 40]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1,x", float, "'x' is none of the numbers from 0 on"),
        ("", float, "'' is none of"),
        ("1,,2", float, "'' is none of"),
        ("-0.5", float, "'-0.5' is none of"),
        ("nan", float, "'nan' is none of"),
        ("inf", float, "'inf' is none of"),
        ("1,1.0", float, "names one twice"),
        ("0,-0", float, "names one twice"),
        ("10.5", int, "'10.5' is none of the whole numbers from 0 on"),
    ],
)
def test_values_that_are_none_are_told(text: str, kind: type, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_axis("--strengths", text, kind, 0, math.inf)
    assert str(raised.value).startswith(f"--strengths {text}")


def test_the_axes_cross_at_strength_one_and_the_tasks_steps_or_what_is_nearest() -> None:
    assert sweep_plan([10, 20]).center(3) == Setting(strength=1, steps=10, guidance=3)
    assert sweep_plan([4, 12, 40], [0, 0.5, 0.75]).center(3) == Setting(strength=0.75, steps=12, guidance=3)


def test_an_axis_moves_one_thing_and_has_the_base_beside_every_setting() -> None:
    plan = sweep_plan([10, 20])
    center = plan.center(3)
    strengths = plan.on_axis("strength", center)
    assert [each.strength for each in strengths] == [0, 0.5, 1, 1.5]
    assert {(each.steps, each.guidance) for each in strengths} == {(10, 3)}
    steps = plan.on_axis("steps", center)
    assert [(each.strength, each.steps) for each in steps] == [(0, 10), (1, 10), (0, 20), (1, 20)]
    guidances = plan.on_axis("guidance", center)
    assert [(each.strength, each.guidance) for each in guidances] == [(0, 1), (1, 1), (0, 3), (1, 3)]
    everything = {*strengths, *steps, *guidances}
    assert len({each.name for each in everything}) == len(everything)


def test_the_command_is_one_that_makes_it_again_and_names_no_folder() -> None:
    assert sweep_plan([10, 20], keep=True).command == (
        "dgpo-bench sweep shapes --adapter mine.safetensors --strengths 0,0.5,1,1.5 --steps 10,20 --guidances 1,3 "
        "--prompts 60 --keep-pictures"
    )


def test_test_prompts_are_not_swept() -> None:
    task: Task = load_task("shapes")
    sets = swept_sets(task, 60)
    assert list(sets) == [VALIDATION, "shapes/out-of-domain"]
    assert [each.role for each in sets.values()] == ["in_domain", "out_of_domain"]
    assert {each.seed for each in sets.values()} == {VALIDATION_SEED}
    assert all(len(each.prompts) == len(each.tags) <= 60 for each in sets.values())
    assert sets[VALIDATION].metrics[:2] == ("accuracy", "shapes")
    assert "diversity" in sets[VALIDATION].metrics
    noises = [n for each in sets.values() for p in range(len(each.prompts)) for n in each.noise_numbers(p, [0, 1])]
    assert len(set(noises)) == len(noises)


@pytest.mark.parametrize("most", [1, 3, 5, 9, 10, 60, 1000])
def test_few_prompts_are_spread_over_the_kinds(most: int) -> None:
    tags = ["a"] * 50 + ["b"] * 5 + ["c"] * 2
    chosen = few(tags, most)
    assert len(chosen) == min(most, len(tags))
    assert chosen == sorted(set(chosen))
    if most in (9, 10):
        assert {tags[number] for number in chosen} == {"a", "b", "c"}
        assert sum(tags[number] == "a" for number in chosen) <= 5


@pytest.mark.parametrize(
    ("axes", "prompts", "message"),
    [
        (("0", None, None), 60, "--strengths 0: names 0 alone, which is the base"),
        ((None, "0", None), 60, "--steps 0: '0' is none of the whole numbers from 1 to 1000"),
        ((None, "-10", None), 60, "'-10' is none of"),
        ((None, None, "0.5"), 60, "--guidances 0.5: '0.5' is none of the numbers from 1 on"),
        ((None, None, None), 0, "--prompts 0: give one or more"),
        ((None, None, None), 60, "adapter .*nowhere.safetensors"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(
    axes: tuple[str | None, str | None, str | None],
    prompts: int,
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.raises(UserError, match=message) as raised:
        asked_sweep("shapes", None, folder / "nowhere.safetensors", axes, prompts, False, folder / "out")
    assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()
