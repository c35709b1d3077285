"""Checkpoints: whole or not there, checked bit by bit, pruned; and a run that goes on as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, read_adapter
from dgpo_plugin.common.errors import Stopped, UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.base_identity import PartIdentity
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.families.sd3 import SD3Model
from dgpo_plugin.training import checkpoint as module
from dgpo_plugin.training import prompt_groups, run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from dgpo_plugin.training.identity import RunIdentity, check_same_run, replan
from dgpo_plugin.training.run_folder import trim_metrics
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import SMALL
from tests.dgpo_plugin.algorithm_cases import ALGORITHMS, config_for

FULL = "No space left on device"


BASE = {"transformer": PartIdentity(digest="base", settings={"layers": 4})}
IDENTITY = RunIdentity(config={}, base=BASE, prompts_sha256="prompts", packages={})


def progress(iteration: int, mean_reward: float = 0.0) -> Progress:
    return Progress(iteration=iteration, steps=iteration, mean_reward=mean_reward, started="2026-01-01T00:00:00+00:00")


def tensors(iteration: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(iteration)
    names = [f"blocks.{n}.attn.to_q.lora_A" for n in range(12)]
    return {
        copy: {name: torch.randn(3, 4, generator=generator) for name in names} for copy in ("policy", "optimizer.step")
    }


def same(first: Mapping[str, Mapping[str, Tensor]], second: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether two trainers' states are equal to the bit."""
    assert first.keys() == second.keys()
    return all(
        named.keys() == second[copy].keys() and all(torch.equal(t, second[copy][name]) for name, t in named.items())
        for copy, named in first.items()
    )


def save(folder: Path, iteration: int, *, keep: int = 9, mean_reward: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, IDENTITY, progress(iteration, mean_reward), tensors(iteration), keep)


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path: Path) -> None:
    """A checkpoint alone would lie there, where somebody looks for a run."""
    with pytest.raises(UserError, match="cannot write checkpoint .*No such file"):
        save_checkpoint(tmp_path / "away", IDENTITY, progress(1), tensors(1), 9)
    assert not (tmp_path / "away").exists()


def check(path: Path) -> None:
    back = load_checkpoint(path)
    assert back.identity == IDENTITY
    assert same(back.tensors, tensors(back.progress.iteration))


# ---- one checkpoint


@pytest.mark.fast
def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    check(save(tmp_path, 7))
    assert [path.name for path in checkpoints(tmp_path)] == ["000007"]


@pytest.mark.fast
def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for iteration, reward in [(10, 0.1), (20, 0.9), (30, 0.5), (40, 0.3), (50, 0.4)]:
        save(tmp_path, iteration, keep=2, mean_reward=reward)
    assert [path.name for path in checkpoints(tmp_path)] == ["000020", "000040", "000050"]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "altered", "removed"])
def test_damage_is_found_and_the_checkpoint_before_named(tmp_path: Path, name: str, harm: str) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    content = (path / name).read_bytes()
    middle = len(content) // 2
    if harm == "removed":
        (path / name).unlink()
    else:
        changed = bytes([content[middle] ^ 1])
        harmed = {
            "truncated": content[:middle],
            "emptied": b"",
            "altered": content[:middle] + changed + content[middle + 1 :],
        }
        (path / name).write_bytes(harmed[harm])
    with pytest.raises(UserError, match=r"000020 is damaged .*remove that folder to go on from 000010"):
        load_checkpoint(path)
    check(tmp_path / "checkpoints" / "000010")


@pytest.mark.fast
def test_another_versions_checkpoint_is_named_as_one(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format": 1}))
    with pytest.raises(UserError, match=r"000010: was written by another version of dgpo-plugin \(format 1, not 4\)"):
        load_checkpoint(path)


@pytest.mark.fast
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(module, "write_synced", full)
    with pytest.raises(UserError, match=f"cannot write checkpoint .*{FULL}; make room, then go on with: dgpo resume"):
        save(tmp_path, 20)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000010"]
    check(tmp_path / "checkpoints" / "000010")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.fast
def test_killed_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the k-th call that changes the disk, for every k: each checkpoint in sight is whole."""
    calls, fatal = 0, 0

    def dying(name: str) -> None:
        owner = shutil if name == "rmtree" else os
        original = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("rename", "mkdir", "fsync", "unlink", "rmdir", "rmtree"):
        dying(name)
    survived, target = False, 0
    while not survived:
        target, fatal = target + 1, 0
        folder = tmp_path / str(target)
        for iteration in (10, 20, 30):
            save(folder, iteration, keep=1)  # pruning is on its way too
        calls, fatal = 0, target
        try:
            save(folder, 40, keep=1)
            survived = True
        except Killed:
            pass
        fatal = 0
        found = checkpoints(folder)
        assert found
        assert found[-1].name in ("000030", "000040")
        for path in found:
            check(path)
        save(folder, 50, keep=1)  # and the next one cleans up
        assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert target > 8


# ---- a run


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_restored_trainer_is_the_one_that_was_saved(algorithm: str, tmp_path: Path) -> None:
    """After three iterations the old policy differs from the policy and is what the rollout comes from."""
    updates = ["training.updates_per_iteration=2", "training.inner_epochs=2"]
    extra = ["training.iterations=6", "training.ema_every=3", *updates]
    if algorithm == "dgpo":
        extra += ["algorithm.old_policy_after=2", "algorithm.clip=0.01", "algorithm.reference=old_policy"]
    config = config_for(algorithm, *extra)
    whole = build_trainer(config)
    records = whole.iterations()
    for _ in range(3):
        next(records)
    path = save_checkpoint(tmp_path, IDENTITY, run.progress_of(whole), whole.state(), keep=1)
    rest = [record["reward"] for record in records]
    again = build_trainer(config)
    back = load_checkpoint(path)
    again.restore(back.tensors, back.progress.iteration, back.progress.steps)
    assert [record["reward"] for record in again.iterations()] == rest
    assert len(rest) == 3
    assert same(whole.state(), again.state())


@pytest.mark.fast
def test_a_prompt_set_too_large_to_keep_is_encoded_as_the_run_comes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of having all of it in memory, never more than a stretch there, the same bits after a restore."""
    config = config_for("dgpo", "training.iterations=6", "evaluation.images=2", "logging.sample_images=1")
    plain = [record["reward"] for record in build_trainer(config).iterations()]
    monkeypatch.setattr(prompt_groups, "TEXTS_AT_ONCE", 4)  # two iterations of two prompts
    encoded: list[int] = []
    encode = SD3Model.encode

    def counting(self: SD3Model, texts: Sequence[str], *home: torch.device) -> Conditioning:
        encoded.append(len(texts))
        return encode(self, texts, *home)

    monkeypatch.setattr(SD3Model, "encode", counting)
    whole = build_trainer(config)
    records = whole.iterations()
    first = [next(records)["reward"] for _ in range(3)]
    saved = {copy: {name: t.clone() for name, t in named.items()} for copy, named in whole.state().items()}
    rest = [record["reward"] for record in records]
    assert first + rest == pytest.approx(plain, abs=1e-5)
    # At first the empty text and the two pictures'; then those and the prompts of a stretch, three times.
    assert len(encoded) == 4
    assert max(encoded) <= 3 + 4
    again = build_trainer(config)
    again.restore(saved, 3, whole.steps // 2)  # in the middle of the second stretch
    assert [record["reward"] for record in again.iterations()] == rest
    assert same(whole.state(), again.state())


def small(**changes: object) -> list[str]:
    return [
        *SMALL,
        "training.iterations=6",
        "training.decay=none",
        "checkpoint.every=2",
        *(f"{k}={v}" for k, v in changes.items()),
    ]


def train(folder: Path, **changes: object) -> Path:
    return run.train(load_config("shapes", small(**changes)), folder / "run", Console(quiet=True))


def rewrite(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


@pytest.fixture
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_date")
def test_a_run_told_to_go_on_longer_equals_one_that_was_long(tmp_path: Path) -> None:
    long = train(tmp_path / "long")
    short = train(tmp_path / "short", **{"training.iterations": 3})
    rewrite(short.parent / "config.yaml", "iterations: 3", "iterations: 6")
    resumed = run.resume(short.parent, Console(quiet=True))
    a, b = load_file(long), load_file(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_what_a_resumed_run_may_not_change(tmp_path: Path) -> None:
    adapter = train(tmp_path, **{"training.iterations": 2})
    config = adapter.parent / "config.yaml"
    before = config.read_text()
    rewrite(config, "learning_rate: 0.003", "learning_rate: 0.004")
    with pytest.raises(UserError, match=r"training.learning_rate is 0.004, but .* was trained with 0.003; put it back"):
        run.resume(adapter.parent, Console(quiet=True))
    config.write_text(before.replace("seed: 0", "seed: 0\n  sede: 1"))
    with pytest.raises(UserError, match="unknown key training.sede; did you mean 'seed'"):
        run.resume(adapter.parent, Console(quiet=True))
    config.write_text(before)
    with pytest.raises(UserError, match="holds a run already; go on with it by `dgpo resume"):
        train(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        run.resume(tmp_path, Console(quiet=True))


@pytest.mark.slow
def test_a_falling_learning_rate_fixes_where_the_run_ends(tmp_path: Path) -> None:
    adapter = train(tmp_path, **{"training.iterations": 2, "training.decay": "linear"})
    rewrite(adapter.parent / "config.yaml", "iterations: 2", "iterations: 4")
    with pytest.raises(
        UserError, match="iterations is 4, but .* was trained with 2, .*dgpo resume .*run --iterations 4"
    ):
        run.resume(adapter.parent, Console(quiet=True))


class Rates:
    """A ``watch`` that notes the learning rate of every iteration, and ends the run after one of them."""

    def __init__(self, until: int | None = None) -> None:
        self.used: dict[int, float] = {}
        self.until = until

    def __call__(self, trainer: Trainer, record: dict[str, float] | None) -> None:
        if record is not None:
            self.used[trainer.iteration - 1] = trainer.optimizer.param_groups[0]["lr"]
            if trainer.iteration == self.until:
                raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_date")
def test_a_run_whose_learning_rate_falls_is_made_longer(tmp_path: Path) -> None:
    """From there on the rate is the longer run's; killed before and after its next checkpoint, the same bits."""
    quiet = Console(quiet=True)
    adapters, base = [], 0.003
    for number, kills in enumerate([(), (5, 6, 8)]):
        adapter = train(tmp_path / str(number), **{"training.iterations": 4, "training.decay": "linear"})
        rates = Rates()
        for rates.until in kills:  # the first two before anything of the longer run is saved, at 6
            with pytest.raises(KeyboardInterrupt):
                run.resume(adapter.parent, quiet, iterations=None if rates.used else 9, watch=rates)
        rates.until = None
        run.resume(adapter.parent, quiet, iterations=None if kills else 9, watch=rates)
        assert rates.used == {i: pytest.approx(base - base * i / 9, rel=1e-12) for i in range(4, 9)}
        adapters.append(adapter)
    first, second = (load_file(adapter) for adapter in adapters)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    steps = AdapterCard.of(read_adapter(adapters[0])).optimizer_steps
    assert "after iteration 4 its end was moved from 4; now 9" in steps


@pytest.mark.slow
def test_the_end_may_be_moved_again_and_both_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = train(tmp_path, **{"training.iterations": 2, "training.decay": "linear"})
    console = Console(width=400)
    run.resume(adapter.parent, console, iterations=4)
    said = capsys.readouterr().out
    assert "ends after iteration 4 instead of 2; the learning rate goes from 0 to 0.0015 and falls from there" in said
    run.resume(adapter.parent, console, iterations=6)
    assert load_config(str(adapter.parent / "config.yaml")).training.replanned == ((2, 2), (4, 4))
    capsys.readouterr()
    run.resume(adapter.parent, console)
    assert "instead of" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--iterations 5: .*000006 is beyond that; give more"):
        run.resume(adapter.parent, console, iterations=5)


@pytest.mark.fast
@pytest.mark.parametrize(("decay", "replanned"), [("none", ()), ("linear", ((3, 6),))])
def test_moving_the_end_of_a_plan(decay: str, replanned: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    config = load_config("shapes", small(**{"training.decay": decay}))
    then = IDENTITY.model_copy(update={"config": config.model_dump(mode="json")})
    moved = replan(config, then, 3, 8)
    assert (moved.training.iterations, moved.training.replanned) == (8, replanned)
    check_same_run(then, then.model_copy(update={"config": moved.model_dump(mode="json")}), tmp_path, 3)
    # Moved again before anything was saved, and back to where it was.
    assert replan(moved, then, 3, 9).training.replanned == replanned
    assert replan(moved, then, 3, 6) == config
    assert replan(config, None, 0, 8).training.replanned == ()


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_date")
def test_a_constant_learning_rate_is_made_longer_without_a_trace(tmp_path: Path) -> None:
    long = train(tmp_path / "long", **{"training.iterations": 4})
    short = train(tmp_path / "short", **{"training.iterations": 2})
    done = subprocess.run(
        command("resume", str(short.parent), "--iterations", "4"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert short.read_bytes() == long.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_date")
def test_other_prompts_are_refused(tmp_path: Path) -> None:
    from dgpo_plugin.prompts.registry import load_prompts

    file = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": p.text, **p.metadata}) for p in load_prompts("shapes/train")[:9]]
    file.write_text("\n".join(lines))
    adapter = train(tmp_path, **{"training.iterations": 2, "prompts.train": file})
    file.write_text("\n".join(lines[:8]))
    with pytest.raises(UserError, match="the prompts are not those"):
        run.resume(adapter.parent, Console(quiet=True))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dgpo_plugin", *arguments]


def train_command(folder: Path) -> list[str]:
    changes = small(**{"checkpoint.every": 1, "logging.sample_every": 2})
    return command("train", "shapes", "--output", str(folder), *(part for c in changes for part in ("--set", c)))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}


def metrics(folder: Path) -> list[dict[str, float]]:
    """Without the seconds, which are no result."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    subprocess.run(train_command(whole), env=environment(), check=True, capture_output=True)
    # In the time of a few iterations as they are on this machine now, or a busy one would be killed before every save.
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    span = max(0.8, 3 * max(json.loads(line)["seconds"] for line in lines))
    moments, kills = random.Random(4), 0
    while not (broken / "adapter.safetensors").exists():
        going_on = (broken / "config.yaml").exists()
        arguments = command("resume", str(broken)) if going_on else train_command(broken)
        process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        process.stdout.readline()  # the base's reward: imports are over, files are being written
        time.sleep(moments.uniform(0, span))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert kills < 40
    assert kills > 1
    subprocess.run(command("resume", str(broken)), env=environment(), check=True, capture_output=True)
    assert (broken / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert metrics(broken) == metrics(whole)
    last = "checkpoints/000006/state.safetensors"
    assert (broken / last).read_bytes() == (whole / last).read_bytes()
    for picture in ("000000.png", "000006.png"):
        assert (broken / "samples" / picture).read_bytes() == (whole / "samples" / picture).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_date")
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", **{"checkpoint.every": 100})
    original = Trainer.iterate

    def interrupted(trainer: Trainer, iteration: int) -> dict[str, float]:
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, iteration)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    with pytest.raises(Stopped, match=r"stopped after iteration 3 of 6, all of it saved; go on with: dgpo resume "):
        train(tmp_path / "stopped", **{"checkpoint.every": 100})
    folder = tmp_path / "stopped" / "run"
    assert (folder / "adapter.safetensors").exists()
    assert [path.name for path in checkpoints(folder)] == ["000003"]
    assert run.resume(folder, Console(quiet=True)).read_bytes() == whole.read_bytes()


def signalled(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every run get a signal at the start of its second iteration."""
    original = Trainer.iterate

    def interrupted(trainer: Trainer, iteration: int) -> dict[str, float]:
        if iteration == 1:
            os.kill(os.getpid(), number)
        return original(trainer, iteration)

    monkeypatch.setattr(Trainer, "iterate", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_clusters_and_closed_terminals_send_is_heeded_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    signalled(number, monkeypatch)
    inherited = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(Stopped, match=r"stopped after iteration 2 of 6, all of it saved"):
            train(tmp_path)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled(signal.SIGHUP, monkeypatch)
        assert train(tmp_path).exists()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fast
def test_a_damaged_log_is_no_reason_not_to_go_on(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    good = json.dumps({"iteration": 1, "reward": 0.5})
    late = json.dumps({"iteration": 9})
    damaged = [b"\xff\xfe\x00", b"[1]", b"3", b'{"other": 1}', b'{"iteration": "x"}', b"[" * 100_000, b'{"iter']
    log.write_bytes(b"\n".join([good.encode(), *damaged, late.encode()]))
    trim_metrics(log, 5)
    assert log.read_text() == good + "\n"


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trainer: Trainer, iteration: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return {}

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.fast
@pytest.mark.parametrize("written", ["4", "5", 5, True, None, 2.5])
def test_a_checkpoints_format_is_the_one_that_is_read(tmp_path: Path, written: object) -> None:
    path = save(tmp_path, 10)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format": written}))
    with pytest.raises(UserError, match="was written by another version of dgpo-plugin"):
        load_checkpoint(path)


@pytest.mark.fast
def test_a_checkpoint_that_says_no_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({key: value for key, value in values.items() if key != "format"}))
    with pytest.raises(UserError, match="another version"):
        load_checkpoint(path)


@pytest.mark.fast
def test_a_state_nested_without_end_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    (path / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
