"""A training run on disk: config.yaml, metrics.jsonl, checkpoints/, samples/ and, at the end, adapter.safetensors."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError
from dgpo_plugin.common.files import atomic_path, write_text_atomically
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.common.provenance import creation_date, package_versions
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.prompts.files import prompts_hash
from dgpo_plugin.rewards import Reward
from dgpo_plugin.training.checkpoint import (
    Checkpoint,
    State,
    check_same_run,
    checkpoints,
    load_checkpoint,
    replan,
    save_checkpoint,
)
from dgpo_plugin.training.trainer import Trainer

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that end a run after the iteration under way."""
Watch = Callable[[Trainer, dict[str, float] | None], None]
"""Called once the model is loaded, with None, and after every iteration with its record."""


def check_folder(output: Path) -> None:
    """Find out that a run cannot be written before the model is loaded.

    Raises:
        UserError: the folder holds a run already, or cannot be made or written to.
    """
    if (output / CONFIG_FILE).exists():
        raise UserError(
            f"output {output}: holds a run already; go on with it by `dgpo resume {output}`, or choose another --output"
        )
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {output}: {existing} is not a writable folder; choose another --output")


def train(
    config: RunConfig, output: Path, console: Console, *, reward: Reward | None = None, watch: Watch | None = None
) -> Path:
    """Start a run and write its adapter.

    Ctrl-C (or SIGTERM) ends it after the iteration under way, with a checkpoint and the adapter as it is then; a
    second Ctrl-C ends it at once. A :class:`StopNow` from ``watch``, or from a hook that it put on the model, ends it
    where it stands, saved as of the iteration before.

    Args:
        reward: loaded already; None to load the configuration's.
        watch: is shown the run as it goes.

    Returns:
        The adapter's path.

    Raises:
        Stopped: by such a signal.
    """
    processes = join_processes()
    processes.on_main(lambda: check_folder(output))
    return _run(config, output, console, processes, None, reward, watch)


def resume(
    output: Path,
    console: Console,
    *,
    iterations: int | None = None,
    reward: Reward | None = None,
    watch: Watch | None = None,
) -> Path:
    """Go on with a run from its last checkpoint (from the beginning if it has none), as if it had never stopped.

    Args:
        iterations: where it is to end now, counted from its beginning; None to leave that as it is. Written into the
            run's configuration (:func:`dgpo_plugin.training.checkpoint.replan`).
        reward, watch: as for :func:`train`.

    Raises:
        UserError: no run there, settings that were changed since, or a damaged checkpoint.
        Stopped: as :func:`train`.
    """
    if not (output / CONFIG_FILE).exists():
        raise UserError(f"{output}: holds no run (no {CONFIG_FILE}); start one with `dgpo train`")
    config = load_config(str(output / CONFIG_FILE))
    found = checkpoints(output)
    checkpoint = load_checkpoint(found[-1]) if found else None
    if iterations is not None:
        config = replan(config, checkpoint, iterations)
    return _run(config, output, console, join_processes(), checkpoint, reward, watch)


def _run(
    config: RunConfig,
    output: Path,
    console: Console,
    processes: Processes,
    checkpoint: Checkpoint | None,
    reward: Reward | None,
    watch: Watch | None,
) -> Path:
    console = console if processes.is_main else Console(quiet=True)
    with console.status("loading the model"):
        trainer = Trainer(config, reward=reward, failures=output / "failed-reward")
        config = trainer.config
        fixed = run_state(trainer)
        if checkpoint is not None:
            check_same_run(checkpoint, fixed)
            fixed = fixed.model_copy(update={"started": checkpoint.state.started})
            restore_run(trainer, checkpoint)
            console.print(_moved_end(config, checkpoint), end="", soft_wrap=True)
        processes.on_main(lambda: _prepare_folder(output, fixed.config, trainer.iteration))
        _start_trackers(trainer, config, output)
        if watch is not None:
            watch(trainer, None)
        before = trainer.held_out_reward() if checkpoint is None else checkpoint.state.reward_before
        fixed = fixed.model_copy(update={"reward_before": before})
    console.print(f"held-out reward of the base: {before:.3f}")
    if checkpoint is None:
        _save_samples(trainer, config, output, 0)
    else:
        console.print(f"going on after iteration {trainer.iteration}, from {checkpoint.path}", soft_wrap=True)
        if fixed.packages != checkpoint.state.packages:
            console.print("other package versions than before: the result will differ in the last bits")
    started = time.perf_counter()
    adapter = output / ADAPTER_FILE
    try:
        after = None
        with contextlib.suppress(StopNow):
            _iterate(trainer, config, output, console, fixed, watch)
            if trainer.iteration >= config.training.iterations:
                after = trainer.held_out_reward()

        def export() -> None:
            facts = TrainingFacts(
                config,
                trainer.steps,
                reward=trainer.reward_title,
                reward_before=before,
                reward_after=after,
                date=fixed.started,
            )
            export_adapter(trainer.policy, trainer.evaluation_weights, adapter, facts)

        processes.on_main(export)
    finally:
        trainer.accelerator.end_training()  # trackers, and the process group
    if after is None:
        raise Stopped(
            f"stopped after iteration {trainer.iteration} of {config.training.iterations}, all of it saved; "
            f"go on with: dgpo resume {output}"
        )
    console.print(
        f"held-out reward {before:.3f} -> {after:.3f} in {time.perf_counter() - started:.0f} s; adapter: {adapter}",
        soft_wrap=True,
    )
    return adapter


def run_state(trainer: Trainer) -> State:
    """Where a run is now, and what its result depends on."""
    config, scaler = trainer.config, trainer.accelerator.scaler
    return State(
        iteration=trainer.iteration,
        steps=trainer.steps,
        started=creation_date(),
        config=config.model_dump(mode="json"),
        base_weights_hash=trainer.model.identity["weights_hash"],
        reward_sha256=trainer.reward_sha256,
        prompts_sha256=prompts_hash([*trainer.prompts, *trainer.held_out]),
        packages=package_versions(),
        gradient_scaler={} if scaler is None else dict(scaler.state_dict()),
    )


def restore_run(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Become the run that a checkpoint was taken of."""
    trainer.restore(checkpoint.tensors, checkpoint.state.iteration, checkpoint.state.steps)
    if trainer.accelerator.scaler is not None and checkpoint.state.gradient_scaler:
        trainer.accelerator.scaler.load_state_dict(dict(checkpoint.state.gradient_scaler))


def _iterate(
    trainer: Trainer, config: RunConfig, output: Path, console: Console, fixed: State, watch: Watch | None
) -> None:
    """Train to the end, or until a signal or ``watch`` asks to stop; what is done by then has a checkpoint."""
    processes, rewards = trainer.processes, list[float]()
    log_path = output / METRICS_FILE if processes.is_main else Path(os.devnull)
    with _progress(console) as bar, log_path.open("a", encoding="utf-8") as log, _stop_asked(bar.console) as asked:
        total = config.training.iterations
        task = bar.add_task(config.algorithm.name, total=total, completed=trainer.iteration)

        def save() -> None:
            measured = {"mean_reward": sum(rewards) / len(rewards), "reward_before": fixed.reward_before}
            state = run_state(trainer).model_copy(update={"started": fixed.started, **measured})
            write = functools.partial(save_checkpoint, output, state, trainer.state(), config.checkpoint.keep)
            processes.on_main(write)
            rewards.clear()

        saved, steps = trainer.iteration, trainer.steps
        try:
            for record in trainer.iterations():
                steps = trainer.steps
                log.write(json.dumps(record) + "\n")
                log.flush()
                trainer.accelerator.log(record, step=trainer.iteration)
                bar.update(task, advance=1)
                bar.console.print(_line(record), highlight=False)
                for line in _constant_rewards(record, config):
                    bar.console.print(line, highlight=False)
                rewards.append(record["reward"])
                if config.logging.sample_every and trainer.iteration % config.logging.sample_every == 0:
                    _save_samples(trainer, config, output, trainer.iteration)
                if watch is not None:
                    watch(trainer, record)
                stop = bool(processes.sum(torch.tensor(float(len(asked)), device=trainer.policy.device)))
                if stop or trainer.iteration % config.checkpoint.every == 0 or trainer.iteration == total:
                    save()
                    saved = trainer.iteration
                if stop:
                    return
        except StopNow:
            # Of an iteration with several updates the first may be done: then only the checkpoint before is exact.
            if trainer.iteration > saved and trainer.steps == steps:
                save()
            raise


@contextlib.contextmanager
def _stop_asked(console: Console) -> Iterator[list[int]]:
    """Signals that came in the block, only noted; but a second Ctrl-C acts.

    SIGTERM never does: launchers send it after Ctrl-C, and clusters before they take a machine back. Nor do SIGUSR1,
    which Slurm sends for that, and SIGHUP, a closed terminal's, unless nohup has it ignored.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1:
            console.print("stopping after this iteration; Ctrl-C again stops at once")

    # Not every system has them all.
    known = {name: getattr(signal, name) for name in STOPPING if hasattr(signal, name)}
    if signal.getsignal(known.get("SIGHUP", signal.SIGINT)) is signal.SIG_IGN:
        known.pop("SIGHUP", None)
    before = {number: signal.signal(number, note) for number in known.values()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_folder(output: Path, config: dict[str, Any], iteration: int) -> None:
    file = output / CONFIG_FILE
    # Written anew only if its end was moved: else it is as its owner left it.
    if not file.exists() or load_config(str(file)).training != RunConfig.model_validate(config).training:
        write_text_atomically(file, yaml.safe_dump(config, sort_keys=False))
    trim_metrics(output / METRICS_FILE, iteration)


def trim_metrics(path: Path, iteration: int) -> None:
    """Leave out of metrics.jsonl what comes after an iteration and is about to be done again.

    And what is no record: a line cut by a kill, or damaged. It is a log, and no reason not to go on.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
    write_text_atomically(path, "".join(kept))


def _start_trackers(trainer: Trainer, config: RunConfig, output: Path) -> None:
    if not config.logging.trackers:
        return
    trainer.accelerator.project_configuration.set_directories(str(output))
    try:
        from accelerate.tracking import filter_trackers

        trainer.accelerator.log_with = filter_trackers(list(config.logging.trackers), trainer.accelerator.logging_dir)
        trainer.accelerator.init_trackers("dgpo", config={"config": config.model_dump_json()})
    except (ImportError, ValueError) as error:
        raise UserError(f"logging.trackers: {error}; install the tracker or leave it out") from error


def _moved_end(config: RunConfig, checkpoint: Checkpoint) -> str:
    """A line if the run ends elsewhere than when the checkpoint was written, else nothing."""
    training, done = config.training, checkpoint.state.iteration
    before = training.model_copy(update={"iterations": checkpoint.state.config["training"]["iterations"]})
    if before.iterations == training.iterations:
        return ""
    then, now = (plan.rate_at(done / plan.iterations) for plan in (before, training))
    rate = (
        ""
        if training.decay == "none"
        else f"; the learning rate goes from {then:.3g} to {now:.3g} and falls from there"
    )
    return f"the run ends after iteration {training.iterations} instead of {before.iterations}{rate}\n"


def _save_samples(trainer: Trainer, config: RunConfig, output: Path, iteration: int) -> None:
    count = config.logging.sample_images
    if not config.logging.sample_every:
        return
    prompts = [trainer.held_out[index % len(trainer.held_out)] for index in range(count)]
    grid = image_grid(trainer.sample(prompts, seed=1), columns=min(8, count))

    def write() -> None:
        with atomic_path(output / "samples" / f"{iteration:06d}.png") as temporary:
            grid.save(temporary)

    trainer.processes.on_main(write)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _constant_rewards(record: dict[str, float], config: RunConfig) -> list[str]:
    """A line for each reward that varied inside no prompt group."""
    key = "constant_groups"
    marked = [name[len(key) :] for name, share in record.items() if name.startswith(key) and share == 1]
    groups = config.training.prompts_per_iteration
    return [
        f"  reward {name or config.reward.label}: the same for all images of each of the {groups} prompt groups, "
        f"so nothing was learned from it"
        for name in [name[1:] for name in marked if name] or marked
    ]


def _line(record: dict[str, float]) -> str:
    return (
        f"iteration {record['iteration']:4.0f}  reward {record['reward']:.3f}  "
        f"group std {record['reward_group_std']:.3f}  clipped {record['clip_fraction']:5.1%}  "
        f"kl {record['kl']:.4f}  {record['seconds']:.2f} s"
    )
