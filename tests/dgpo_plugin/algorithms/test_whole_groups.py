"""Where a micro-batch holds whole prompt groups their weight is taken from the pass that is differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Layout, Random
from dgpo_plugin.algorithms.rollout import holds_whole_groups
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.algorithm_cases import (
    FORWARD,
    config_for,
    in_float64,
    make_algorithm,
    rollout_and_advantages,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", ["dgpo", "crd"])
def test_one_pass_is_the_gradient_of_two_and_costs_less(policy: Policy, name: str) -> None:
    in_float64(policy)
    config = config_for(name, *(["algorithm.clip=0.001", "algorithm.kl_weight=0.3"] if name == "dgpo" else []))
    rollout, advantages = rollout_and_advantages(config, policy)
    algorithm = make_algorithm(config, policy)
    algorithm.after_step(3)
    for copy in algorithm.state().values():
        for tensor in copy.values():
            tensor.mul_(0.9)
    found: dict[int | None, list[Tensor]] = {}
    spent, logged = {}, {}
    for size in (4, 2, None):  # a group, half of one, and all at once
        for parameter in policy.parameters.values():
            parameter.grad = None
        algorithm.micro_batch_size = size
        with policy.counting() as cost:
            logged[size] = algorithm.gradient(rollout, advantages, Random(0, 0))
        spent[size] = cost.total
        found[size] = [parameter.grad.clone() for parameter in policy.parameters.values()]  # type: ignore[union-attr]
    for size in (4, None):
        for a, b in zip(found[size], found[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert {key: value for key, value in logged[size].items() if key != "group_pass"} == pytest.approx(
            {key: value for key, value in logged[2].items() if key != "group_pass"}, rel=1e-5
        )
    assert spent[4] == spent[None] == spent[2] - 8 * 2  # a forward of every image at both flow times
    assert [logged[size]["group_pass"] for size in (4, 2, None)] == [0, 1, 0]
    costs = {
        size: type(algorithm).cost(config_for(name, f"training.micro_batch_size={size}")).training for size in (4, 2)
    }
    assert costs[2] - costs[4] == 2


@pytest.mark.parametrize(("groups", "updates", "count"), [(4, 1, 2), (8, 2, 4), (6, 3, 2), (6, 1, 4), (5, 5, 2)])
def test_whole_groups_are_dealt_where_they_divide(groups: int, updates: int, count: int) -> None:
    layout = Layout(groups, 3)
    shares = [layout.share(Processes(rank, count), updates) for rank in range(count)]
    assert sorted(torch.cat(shares).tolist()) == list(range(layout.samples))
    whole = (groups // updates) % count == 0
    assert holds_whole_groups(groups // updates, count) == whole
    for rank, share in enumerate(shares):
        assert share.tolist() == sorted(share.tolist())
        if whole:
            assert torch.bincount(layout.groups_of(share), minlength=groups).unique().tolist() == [0, 3]
            for update in range(updates):  # as many in every update, so that processes keep step
                inside = share // 3 // (groups // updates) == update
                assert int(inside.sum()) == layout.samples // updates // count
        else:
            assert share.tolist() == list(range(rank, layout.samples, count))


def test_alone_a_process_has_all_samples_in_their_order() -> None:
    assert Layout(3, 4).share(Processes()).tolist() == list(range(12))


class Silent(Processes):
    """One of several that hears nothing of the others, as none has to where no group is cut."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize(
    ("name", "dealt_whole"),
    [*[(name, True) for name in FORWARD], *[(name, False) for name in ("nft", "elbo", "awm", "ram")]],
)
def test_the_processes_gradients_add_up_to_that_of_one(policy: Policy, name: str, dealt_whole: bool) -> None:
    in_float64(policy)
    config = config_for(name)
    rollout, advantages = rollout_and_advantages(config, policy)

    def gradient(ranks: list[Processes]) -> list[Tensor]:
        for parameter in policy.parameters.values():
            parameter.grad = None
        for processes in ranks:
            algorithm = make_algorithm(config, policy, processes)
            algorithm.micro_batch_size = 4
            share = rollout.layout.share(processes) if dealt_whole else processes.share(8)
            algorithm.gradient(rollout.select(share), advantages, Random(0, 0))
        return [parameter.grad.clone() for parameter in policy.parameters.values()]  # type: ignore[union-attr]

    whole = gradient([Processes()])
    assert max(float(slope.abs().max()) for slope in whole) > 1e-6
    for a, b in zip(gradient([Silent(0, 2), Silent(1, 2)]), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
