"""A budget in measured operations: every method gets the iterations that it is enough for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dgpo_bench.base import measure_base
from dgpo_bench.budget import IterationCost, check_budget, check_budgets, cost_of, expected_cost
from dgpo_bench.cell import run_cell
from dgpo_bench.cost import count_flops
from dgpo_bench.gpu.flops import Flops, skeleton_flops
from dgpo_bench.plan import Plan, cell_file
from dgpo_bench.preset import load_preset
from dgpo_bench.size import Size
from dgpo_bench.written import read_cell
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.build import build_trainer
from tests.bench.test_cell import Ear
from tests.bench.test_cell_processes import small_plan
from tests.conftest import SMALL, one_reward

FLOPS = Flops(forward=100, training=220)
RECORD = {"iteration": 1, "denoiser_evaluations": 50.0, "differentiated_evaluations": 30.0}


@pytest.mark.fast
def test_a_backward_costs_what_was_counted_and_not_two_forwards() -> None:
    cost = cost_of(RECORD)
    assert cost.operations(FLOPS) == 20 * 100 + 10 * 220
    assert cost.spends(Size(evaluations=1000), FLOPS) == 50
    assert cost.spends(Size(flops=1e6), FLOPS) == 4200


@pytest.mark.fast
def test_kept_graphs_save_a_forward_of_each_and_no_backward() -> None:
    """As it is expected, and as an iteration counts it: the report divides operations by the one or the other."""

    def moving(images: Tensor, prompts: object) -> Tensor:
        return torch.arange(len(images)).float()

    plain = [change for change in SMALL if not change.startswith("algorithm.")]
    plain += ["algorithm.name=flow-grpo", "algorithm.guidance=2", "algorithm.kl_weight=0.1"]
    costs = []
    for keep in (False, True):
        config = load_config("shapes", [*plain, f"algorithm.keep_graphs={keep}"])
        record = next(build_trainer(config, rewards=one_reward(moving)).iterations())
        costs.append(cost_of(record))
        assert expected_cost(config) == costs[-1]
    twice, once = costs
    forwards = twice.differentiated / 3
    assert twice.evaluations - once.evaluations == forwards == 8 * 3 * 2
    assert twice.operations(FLOPS) - once.operations(FLOPS) == forwards * FLOPS.forward


@pytest.mark.fast
def test_a_budget_is_in_one_unit() -> None:
    for wrong in ({}, {"evaluations": 10, "flops": 1e9}, {"flops": float("inf")}, {"flops": 0}):
        with pytest.raises(ValidationError):
            Size(**wrong)
    preset, _ = load_preset("shapes")
    sized = preset.sized("quick", flops=2.5e11)
    assert (sized.evaluations, sized.budget, sized.budget_option) == (None, 2.5e11, "--flops 2.5e11")
    assert preset.sized("quick", evaluations=7).budget_option == "--evaluations 7"
    for given, message in (
        ({"flops": -1.0}, "^--flops -1: must be more than nothing"),
        ({"flops": float("nan")}, "^--flops nan: "),
        ({"flops": 1.0, "evaluations": 1}, "^--flops, --evaluations: the budget is one of the two"),
    ):
        with pytest.raises(UserError, match=message):
            preset.sized("quick", **given)


@pytest.mark.fast
def test_a_budget_for_no_iteration_is_told_in_its_own_unit() -> None:
    check_budget(Size(flops=4200), "dgpo", RECORD, FLOPS)
    with pytest.raises(UserError, match=r"^--flops 4000: one iteration of dgpo takes 4.2e\+03; give at least ten"):
        check_budget(Size(flops=4000), "dgpo", RECORD, FLOPS)
    with pytest.raises(UserError, match=r"^--evaluations 49: one iteration of dgpo takes 50; give"):
        check_budget(Size(evaluations=49), "dgpo", RECORD, FLOPS)


@pytest.mark.fast
def test_a_budget_for_no_iteration_of_another_entry_is_told_before_any_is_trained() -> None:
    preset, task = load_preset("shapes")
    configs = {entry: preset.run_config(task, entry, 0, {}) for entry in ("dgpo", "flow-grpo")}
    costs = {entry: expected_cost(config).evaluations for entry, config in configs.items()}
    assert costs["dgpo"] < costs["flow-grpo"]
    check_budgets(Size(evaluations=int(costs["flow-grpo"])), configs, FLOPS)
    with pytest.raises(UserError, match=rf"one iteration of flow-grpo takes {costs['flow-grpo']:.0f}; give at least"):
        check_budgets(Size(evaluations=int(costs["dgpo"])), configs, FLOPS)


def in_operations(folder: Path, iterations: float) -> tuple[Plan, IterationCost, Flops]:
    """The small comparison with a budget for so many iterations of its challenger."""
    plan = small_plan(folder)
    config = plan.base_config()
    flops, cost = skeleton_flops(config.model, config.lora), expected_cost(config)
    size = plan.size.model_copy(update={"evaluations": None, "flops": iterations * cost.operations(flops)})
    return plan.model_copy(update={"size": size}), cost, flops


@pytest.mark.slow
def test_a_cell_spends_its_operations_and_says_both(tmp_path: Path) -> None:
    """Counted on the real denoiser, and as its shapes have it; no iteration is dearer than is planned for."""
    plan, cost, flops = in_operations(tmp_path, 3.5)
    measure_base(plan, tmp_path / "out")
    run_cell(plan, tmp_path / "out", "dgpo", 0, Ear())
    record = read_cell(cell_file(tmp_path / "out", "dgpo", 0))
    last = record.checkpoints[-1]
    assert last.iteration >= 3
    assert last.flops is not None
    assert 0.6 * plan.size.budget < last.flops <= plan.size.budget
    assert 0 < last.denoiser_evaluations <= last.iteration * cost.evaluations
    assert count_flops(build_trainer(plan.base_config())) == flops
