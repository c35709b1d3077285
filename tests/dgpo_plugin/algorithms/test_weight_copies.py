"""Trailing copies of the adapter: the moving average, and the old policy's schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from dgpo_plugin.algorithms.dgpo import DGPO, DGPOConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.copies import move_towards
from dgpo_plugin.training.build import build_trainer
from tests.dgpo_plugin.algorithm_cases import config_for

pytestmark = pytest.mark.fast

SHAPES = [(3, 4), (5,)]


class FakePolicy:
    """What ``DGPO.after_step`` needs of a policy, without a model."""

    def __init__(self) -> None:
        self.parameters = {name: nn.Parameter(tensor) for name, tensor in tensors(seed=0).items()}

    def copy_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(shape): torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES}


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def mixed(share: float, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: share * first[name] + (1 - share) * second[name].detach() for name in first}


def close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_move_towards_keeps_decay_of_the_copy(decay: float) -> None:
    copy, parameters = tensors(seed=1), {name: nn.Parameter(tensor) for name, tensor in tensors(seed=2).items()}
    expected = mixed(decay, copy, parameters)
    addresses = [tensor.data_ptr() for tensor in copy.values()]
    move_towards(copy, parameters, decay)
    close(copy, expected)
    assert [tensor.data_ptr() for tensor in copy.values()] == addresses  # in place
    assert not any(tensor.requires_grad for tensor in copy.values())
    close(detached(parameters), tensors(seed=2))  # the parameters stay


def test_move_towards_in_float32() -> None:
    copy, parameters = {"a": torch.full((4,), 2.0)}, {"a": torch.full((4,), 1.0)}
    for _ in range(50):
        move_towards(copy, parameters, 0.9)
    assert copy["a"].dtype == torch.float32
    torch.testing.assert_close(copy["a"], torch.full((4,), 1 + 0.9**50), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("step", "keep"), [(0, 0.0), (1, 0.001), (100, 0.1), (299, 0.299), (300, 0.3), (301, 0.3), (5000, 0.3)]
)
def test_the_old_policy_trails_by_the_schedule(step: int, keep: float) -> None:
    policy = FakePolicy()
    algorithm = DGPO(DGPOConfig(), policy, Processes(), None)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in algorithm.old_weights.items()}
    moved_to = tensors(seed=3)
    for name, parameter in policy.parameters.items():
        parameter.data.copy_(moved_to[name])
    algorithm.after_step(step)
    close(algorithm.old_weights, mixed(keep, before, moved_to))
    close(detached(policy.parameters), moved_to)


def test_the_old_policy_over_many_steps() -> None:
    policy = FakePolicy()
    algorithm = DGPO(DGPOConfig(), policy, Processes(), None)  # type: ignore[arg-type]
    expected = policy.copy_weights()
    for step in range(400):
        for parameter in policy.parameters.values():
            parameter.data.add_(0.01 * (step % 7 - 2))
        algorithm.after_step(step)
        mu = step / 1000 if step < 300 else 0.3
        expected = mixed(mu, expected, policy.parameters)
    close(algorithm.old_weights, expected)


def test_the_rollout_moves_to_the_old_policy_after_more_steps_than_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code asks for ``global_step > switch``, with the optimizer steps done before the iteration."""
    trainer = build_trainer(config_for("dgpo", "algorithm.old_policy_after=2", "training.iterations=5"))
    algorithm, policy = trainer.algorithm, trainer.policy
    assert isinstance(algorithm, DGPO)
    plain, sample = policy.with_weights, algorithm.sample
    used: list[Mapping[str, Tensor]] = []
    from_old: list[tuple[int, bool]] = []

    @contextlib.contextmanager
    def with_weights(copy: Mapping[str, Tensor]) -> Iterator[None]:
        used.append(copy)
        with plain(copy):
            yield

    def watched(*arguments: object) -> object:
        used.clear()
        rollout = sample(*arguments)  # type: ignore[arg-type]
        from_old.append((trainer.steps, any(copy is algorithm.old_weights for copy in used)))
        return rollout

    monkeypatch.setattr(policy, "with_weights", with_weights)
    monkeypatch.setattr(algorithm, "sample", watched)
    for _ in trainer.iterations():
        pass
    assert from_old == [(0, False), (1, False), (2, False), (3, True), (4, True)]


# ---- the evaluation weights


def released_average(weights: Sequence[float], batches: int, decay: float, every: int) -> list[float]:
    """DGPO's released loop: an iteration is cut into batches and stepped after the last, and the average is asked to
    refresh after each of them, with the steps done by then; it does so where they are one short of a multiple.

    Args:
        weights: the weight after each step, of a start of 0.

    Returns:
        The average after each iteration.
    """
    average, weight, steps, averages = 0.0, 0.0, 0, []
    for after in weights:
        for batch in range(batches):
            if batch == batches - 1:
                weight, steps = after, steps + 1
            if (steps + 1) % every == 0:
                average += (1 - min((1 + steps) / (10 + steps), decay)) * (weight - average)
        averages.append(average)
    return averages


@pytest.mark.parametrize(
    ("batches", "decay", "every", "steps"), [(2, 0.9, 8, 130), (4, 0.9, 8, 130), (1, 0.9, 8, 130), (3, 0.6, 5, 40)]
)
def test_the_evaluation_weights_are_those_of_the_released_loop(
    batches: int, decay: float, every: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"training.ema_decay={decay}", f"training.ema_every={every}", f"training.ema_repeats={batches}")
    trainer = build_trainer(config_for("dgpo", *settings))
    weights = [float(torch.sin(torch.tensor(1.7 * step))) + step / 50 for step in range(steps)]
    parameters = list(trainer.policy.parameters.values())
    for tensor in (*parameters, *trainer.evaluation_weights.values()):
        tensor.data.zero_()

    def step() -> None:
        for parameter in parameters:
            parameter.data.fill_(weights[trainer.steps])

    monkeypatch.setattr(trainer.optimizer, "step", step)
    expected, compared = released_average(weights, batches, decay, every), 0
    for done in range(1, steps + 1):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        trainer.optimizer_step()
        if (done + 1) % every == 0 and batches > 1:
            continue  # the released loop does the rest of this refresh in the next iteration, with the same weights
        compared += 1
        for tensor in trainer.evaluation_weights.values():
            assert tensor.flatten()[0].item() == pytest.approx(expected[done - 1], rel=1e-5, abs=1e-6)
    assert compared > steps / 2


def test_refreshing_at_every_step_starts_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(config_for("dgpo", "training.ema_every=1", "training.ema_decay=0.95"))
    tensor, parameter = (next(iter(w.values())) for w in (trainer.evaluation_weights, trainer.policy.parameters))
    before = tensor.clone()
    monkeypatch.setattr(trainer.optimizer, "step", lambda: parameter.data.add_(1))
    parameter.grad = torch.ones_like(parameter)
    trainer.optimizer_step()
    torch.testing.assert_close(tensor, before + 9 / 11)
