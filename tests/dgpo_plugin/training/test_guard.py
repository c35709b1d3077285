"""The alarm for reward hacking in a run: what it sees, says, stops and leaves, alone and on several processes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.guard import Guard
from dgpo_plugin.training.identity import bound_settings
from dgpo_plugin.training.metrics import GUARD_METRICS, keys
from dgpo_plugin.training.trainer import Trainer
from tests.dgpo_plugin.training.test_short_runs import TINY

pytestmark = pytest.mark.fast

OWN = "def darkness(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n"
WATCH = ("rewards=brightness", "training.guard.every=1", "training.guard.prompts=8")


def guarded(folder: Path, *changes: str) -> RunConfig:
    """A run that is rewarded for light, whose guard watches the dark."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN)
    metric = f"training.guard.metrics={{dark: {{reward: '{folder / 'own.py'}:darkness'}}}}"
    return load_config("shapes", [*TINY, *WATCH, metric, *changes])


def records(folder: Path) -> list[dict[str, float]]:
    """A run's metrics, but for seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def table(monkeypatch: pytest.MonkeyPatch, values: Mapping[int, tuple[float, float]]) -> None:
    """Have every look see this much of (reward, dark) on all prompts alike, by iteration."""

    def measured(guard: Guard, iteration: int, _weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {
            name: torch.full((8, 2), value) for name, value in zip(("reward", "dark"), values[iteration], strict=True)
        }

    monkeypatch.setattr(Guard, "_measured", measured)


def push(monkeypatch: pytest.MonkeyPatch, sound: int = 0) -> list[int]:
    """Have every look see more reward and, after so many iterations, less dark; gives those that were looked at."""
    real, seen = Guard._measured, list[int]()  # noqa: SLF001

    def measured(guard: Guard, iteration: int, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        seen.append(iteration)
        found = real(guard, iteration, weights)
        fall = iteration if iteration > sound else 0
        return {**found, "reward": found["reward"] + iteration, "dark": found["dark"] - fall}

    monkeypatch.setattr(Guard, "_measured", measured)
    return seen


def test_it_stops_a_run_at_its_best_look_and_all_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (3, -1), 4: (4, -1), 5: (5, -1)})
    then: dict[int, dict[str, Tensor]] = {}

    def note(trainer: Trainer, record: dict[str, float] | None) -> None:
        if record is not None and not trainer.stopped:
            then[trainer.iteration] = trainer.policy.copy_weights()

    console = Console(record=True, width=300, file=io.StringIO())
    whole = ("training.iterations=9", "training.ema_every=1", "training.ema_decay=0", "lora.alpha=2")
    config = guarded(tmp_path / "own", "training.guard.stop=true", *whole)
    adapter = run.train(config, tmp_path / "run", console, watch=note)
    said = console.export_text()
    (line,) = [line for line in said.splitlines() if line.startswith("stopped by training.guard")]
    assert "after iteration 4: dark fell by 1 (the same on every prompt) while reward rose by 4" in line
    assert line.endswith("exported from the best checkpoint, that of iteration 2")
    assert [record["iteration"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert [record["guard_alarm"] for record in records(tmp_path / "run")] == [0, 0, 0, 1]
    file = read_adapter(adapter)
    assert file.header["dgpo.guard"] == line
    assert file.header["dgpo.optimizer_steps"] == "2"
    assert AdapterCard.of(file).guard == line
    ups = sorted((name, t) for name, t in then[2].items() if name.endswith("lora_B"))
    kept = sorted((key, t) for key, t in file.tensors.items() if "lora_B" in key)
    assert all(torch.allclose(mine, its, atol=1e-6) for (_, mine), (_, its) in zip(ups, kept, strict=True))
    # Gone on with, it is a finished run: the same adapter, the same line.
    before = adapter.read_bytes()
    again = Console(record=True, width=300, file=io.StringIO())
    assert run.resume(tmp_path / "run", again).read_bytes() == before
    assert line in again.export_text()


def test_without_stop_the_run_goes_on_and_no_bit_of_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = ["training.iterations=3", "evaluation.images=2"]
    console = Console(record=True, width=300, file=io.StringIO())
    plain = load_config("shapes", [*TINY, "rewards=brightness", *fixed])
    without = read_adapter(run.train(plain, tmp_path / "plain", Console(quiet=True)))
    seen = push(monkeypatch)
    watched = read_adapter(run.train(guarded(tmp_path / "own", *fixed), tmp_path / "watched", console))
    assert seen == [0, 1, 2, 3]
    assert all(torch.equal(tensor, watched.tensors[key]) for key, tensor in without.tensors.items())
    said = console.export_text()
    (line,) = [line for line in said.splitlines() if "alarm, training.guard: after iteration 2: dark fell by 2" in line]
    assert "stopped" not in said
    assert watched.header["dgpo.guard"] in line
    assert "dgpo.guard" not in without.header
    assert AdapterCard.of(without).guard == "-"
    always, _ = keys("dgpo")
    names = ("reward", "sharpness", "diversity", "dark")
    added = {f"{kind}/{name}" for kind in ("guard", "guard_error") for name in names} | {"guard_alarm"}
    expected = {key for key in always if not key.endswith("seconds")} | added
    assert all(
        set(record) - {"velocity_growth"} == expected - {"velocity_growth"} for record in records(tmp_path / "watched")
    )
    assert {metric.key for metric in GUARD_METRICS} == {
        "guard/NAME",
        "guard_error/NAME",
        "guard_alarm",
        "guard_seconds",
    }


def test_a_run_cut_and_gone_on_with_sees_the_same_and_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between the two looks of an alarm: what had fallen and the best look's adapter are in the checkpoint."""
    push(monkeypatch, sound=1)
    config = guarded(tmp_path / "own", "training.guard.stop=true", "training.iterations=6")
    whole = run.train(config, tmp_path / "whole", Console(quiet=True))

    def cut(trainer: Trainer, record: dict[str, float] | None) -> None:
        if trainer.iteration == 2:
            raise StopNow

    with pytest.raises(Stopped):
        run.train(config, tmp_path / "cut", Console(quiet=True), watch=cut)
    ended = run.resume(tmp_path / "cut", Console(quiet=True))
    first, second = (records(tmp_path / name) for name in ("whole", "cut"))
    assert first == second
    assert [record["guard_alarm"] for record in first] == [0.0, 0.0, 1.0]
    one, other = read_adapter(whole), read_adapter(ended)
    assert "that of iteration 1" in one.header["dgpo.guard"]
    assert one.header["dgpo.guard"] == other.header["dgpo.guard"]
    assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
    # Told not to stop, it goes on from where it was stopped.
    with pytest.raises(UserError, match="--accept training"):
        run.resume(tmp_path / "cut", Console(quiet=True), overrides=["training.guard.stop=false"])
    run.resume(tmp_path / "cut", Console(quiet=True), overrides=["training.guard.stop=false"], accept=["training"])
    assert [record["iteration"] for record in records(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    """Each measures whole prompts, nine of them here, and all of it is put together by sums."""

    class Half(Processes):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor

        def fail_together(self, problem: str | None) -> None:
            assert problem is None

    trainer = build_trainer(guarded(tmp_path / "own", "training.guard.prompts=9"))
    guard = trainer.guard
    assert guard is not None
    one = guard._measured(0, None)  # noqa: SLF001
    assert one["reward"].shape == one["dark"].shape == one["sharpness"].shape == (9, 2)
    assert one["diversity"].shape == (9, 1)
    torch.testing.assert_close(one["dark"], 1 - one["reward"])
    parts = []
    for rank in (0, 1):
        guard.held_out = replace(guard.held_out, processes=Half(rank, 2))
        parts.append(guard._measured(0, None))  # noqa: SLF001
    for name, values in one.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], values, atol=1e-6, rtol=1e-5)


# ---- what is refused, and what tells two runs apart


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("prompts.held_out=null", "training.guard looks at validation prompts; name them in prompts.held_out"),
        ("training.guard.metrics=brightness", "metrics: brightness is trained on (rewards.brightness)"),
        ("training.guard.metrics={light: {reward: brightness}}", "metrics: light is trained on (rewards.brightness)"),
        ("training.guard.metrics=sharpness", "the name sharpness is watched anyway; leave it out"),
        ("training.guard.metrics={reward: {reward: jpeg-size}}", "the name reward is taken"),
        ("training.guard.prompt=9", "unknown key training.guard.prompt; did you mean 'prompts'?"),
        ("training.guard.prompts=7", "training.guard.prompts"),
    ],
)
def test_a_guard_that_cannot_be_is_refused_with_the_configuration(change: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config("shapes", [*TINY, *WATCH, change])
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("training.guard.metrics=no-such", "training.guard: no reward 'no-such'"),
        (
            "training.guard.metrics={far: {reward: remote, options: {url: 'http://127.0.0.1:9/'}}}",
            "training.guard: reward far",
        ),
        ("prompts.held_out={own}/few.txt", "training.guard: 1 of the 1 prompts of prompts.held_out"),
        ("training.guard.metrics={mine: {reward: '{own}/own.py:broken'}}", "training.guard: "),
    ],
)
def test_what_is_missing_is_told_before_the_model_is_loaded(
    change: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few.txt").write_text("a hat\n")
    config = guarded(tmp_path, change.replace("{own}", str(tmp_path)))

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("dgpo_plugin.training.build.load_base", load)
    with pytest.raises(UserError) as raised:
        build_trainer(config)
    assert str(raised.value).startswith(told)


def test_a_guard_binds_a_run_only_if_it_can_stop_it() -> None:
    plain, watching, stopping, oftener = (
        bound_settings(load_config("shapes", [*TINY, "rewards=brightness", *more]).model_dump(mode="json"))
        for more in (
            [],
            ["training.guard.every=3", "training.guard.metrics=shapes"],
            ["training.guard.every=3", "training.guard.stop=true", "training.guard.metrics=shapes"],
            ["training.guard.every=4", "training.guard.stop=true", "training.guard.metrics=shapes"],
        )
    )
    assert plain == watching
    assert watching != stopping
    assert {key for key in stopping if stopping[key] != oftener[key]} == {"training.guard.every"}
