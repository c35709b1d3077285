"""A short run is a run: its average is brought up to date where it is looked at, and zeros are never silent."""

from __future__ import annotations

import io
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.errors import StopNow, Stopped
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import one_reward
from tests.dgpo_plugin.algorithm_cases import config_for

pytestmark = pytest.mark.fast

TINY = (
    "model.precision=fp32",
    "lora.rank=2",
    "lora.alpha=4",
    "training.prompts_per_iteration=1",
    "training.group_size=2",
    "evaluation.images=2",
    "evaluation.steps=1",
    "evaluation.guidance=1",
    "logging.sample_every=0",
    "rollout.steps=2",
    "algorithm.rollout_guidance=1",
    "algorithm.timesteps=1",
    "algorithm.noisiest_steps=1",
    "checkpoint.every=100",
)


def tiny(*changes: str) -> RunConfig:
    return load_config("shapes", [*TINY, *changes])


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.mean((1, 2, 3))


def constant(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.ones(len(images))


def trained(folder: Path, config: RunConfig, reward: Any = brightness, watch: Any = None) -> str:
    """What a run says, to whatever end it comes."""
    console = Console(record=True, width=300, file=io.StringIO())
    try:
        run.train(config, folder, console, rewards=one_reward(reward), watch=watch)
    except Stopped as stopped:
        console.print(stopped)
    return console.export_text()


def ups(folder: Path) -> list[Tensor]:
    return [t for key, t in read_adapter(folder / "adapter.safetensors").tensors.items() if "lora_B" in key]


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_a_run_of_fewer_steps_than_a_refresh_exports_what_it_learned(iterations: int, tmp_path: Path) -> None:
    said = trained(tmp_path / "run", tiny(f"training.iterations={iterations}"))
    assert any(up.any() for up in ups(tmp_path / "run"))
    assert "all zeros" not in said


def test_the_average_is_brought_up_to_date_on_a_copy() -> None:
    """As if a refresh were due; where one was just done, it is the state's own; the state is never touched."""
    trainer = build_trainer(config_for("dgpo", "training.ema_every=4"))
    names, parameters = list(trainer.policy.parameters), list(trainer.policy.parameters.values())
    assert all(torch.equal(trainer.average_now()[name], trainer.evaluation_weights[name]) for name in names)
    for steps in range(1, 9):
        for parameter in parameters:
            parameter.data += 1
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.flatten()[0] = 1e-6
        trainer.optimizer_step()
        state = {name: tensor.clone() for name, tensor in trainer.evaluation_weights.items()}
        now = trainer.average_now()
        for name, parameter in trainer.policy.parameters.items():
            kept = 1.0 if (steps + 1) % 4 == 0 else min(0.9, (1 + steps) / (10 + steps))
            expected = kept * state[name] + (1 - kept) * parameter.detach()
            torch.testing.assert_close(now[name], expected)
            assert torch.equal(trainer.evaluation_weights[name], state[name])
            assert now[name].data_ptr() != trainer.evaluation_weights[name].data_ptr()


def test_looking_changes_no_bit_of_the_state_that_goes_on() -> None:
    def end(*, look: bool) -> dict[str, dict[str, Tensor]]:
        trainer = build_trainer(tiny("training.iterations=3"), rewards=one_reward(brightness))
        for _ in trainer.iterations():
            if look:
                trainer.held_out_reward()
        return trainer.state()

    plain, looked = end(look=False), end(look=True)
    for copy, tensors in plain.items():
        assert all(torch.equal(tensor, looked[copy][name]) for name, tensor in tensors.items())


def test_a_signal_after_four_iterations_saves_what_they_learned(tmp_path: Path) -> None:
    def stop(trainer: Trainer, record: dict[str, float] | None) -> None:
        if trainer.iteration == 4:
            signal.raise_signal(signal.SIGTERM)

    said = trained(tmp_path / "run", tiny("training.iterations=9"), watch=stop)
    assert "stopped after iteration 4 of 9" in said
    assert any(up.any() for up in ups(tmp_path / "run"))


def test_a_run_that_was_stopped_and_went_on_is_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")

    def stop(trainer: Trainer, record: dict[str, float] | None) -> None:
        if trainer.iteration == 2:
            signal.raise_signal(signal.SIGTERM)

    config = tiny("training.iterations=5")
    for side, watch in (("a", None), ("b", stop)):
        (tmp_path / side).mkdir()
        trained(tmp_path / side / "run", config, watch=watch)
    run.resume(tmp_path / "b" / "run", Console(quiet=True), rewards=one_reward(brightness))
    first, second = ((tmp_path / side / "run" / "adapter.safetensors").read_bytes() for side in "ab")
    assert first == second


def stop_in_the_first(trainer: Trainer, record: dict[str, float] | None) -> None:
    """Have the first iteration stopped in its middle."""

    def refuse(_: int) -> dict[str, float]:
        raise StopNow

    vars(trainer)["iterate"] = refuse


@pytest.mark.parametrize(
    ("changes", "reward", "watch", "why"),
    [
        ((), constant, None, "the rewards were the same inside every prompt group"),
        (("training.learning_rate=1.0e-46",), brightness, None, "training.learning_rate 1e-46 is too small"),
        ((), brightness, stop_in_the_first, "no iteration was done"),
    ],
)
def test_an_adapter_of_zeros_is_never_silent(
    changes: tuple[str, ...], reward: Any, watch: Any, why: str, tmp_path: Path
) -> None:
    said = trained(tmp_path / "run", tiny("training.iterations=2", *changes), reward, watch)
    assert not any(up.any() for up in ups(tmp_path / "run"))
    assert why in said.split("the adapter is all zeros and changes nothing: ")[1]
    file = read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert "all zeros" in file.header["modelspec.description"]
    assert AdapterCard.of(file).tensors.endswith("all zeros: it changes nothing")
