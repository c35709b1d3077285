"""A training run, started or gone on with: the loop of :mod:`~dgpo_plugin.training.trainer`, kept in a folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError
from dgpo_plugin.common.provenance import creation_date, package_versions
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.places import absolute_places
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.prompts.files import prompts_hash
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import Checkpoint, Progress, save_checkpoint
from dgpo_plugin.training.contents import contents_of
from dgpo_plugin.training.identity import RunIdentity, check_same_run, replan, rounding_notes
from dgpo_plugin.training.progress import constant_reward_lines, iteration_line, progress_bar
from dgpo_plugin.training.run_folder import RunFolder
from dgpo_plugin.training.signals import stop_signals
from dgpo_plugin.training.trainer import Trainer

Watch = Callable[[Trainer, dict[str, float] | None], None]
"""Called once the model is loaded, with None, and after every iteration with its record."""


def train(
    config: RunConfig, output: Path, console: Console, *, rewards: RewardSet | None = None, watch: Watch | None = None
) -> Path:
    """Start a run and write its adapter.

    Ctrl-C (or SIGTERM) ends it after the iteration under way, with a checkpoint and the adapter as it is then; a
    second Ctrl-C ends it at once. A :class:`StopNow` from ``watch``, or from a hook that it put on the model, ends it
    where it stands, saved as of the iteration before.

    Args:
        rewards: loaded already; None to load the configuration's.
        watch: is shown the run as it goes.

    Returns:
        The adapter's path.

    Raises:
        UserError: whatever of the configuration cannot be had, or a folder that cannot be written.
        Stopped: by such a signal.
    """
    processes, folder = join_processes(), RunFolder(output)
    processes.on_main(folder.check_new)
    config = absolute_places(config, Path.cwd())
    return _run(config, folder, _quiet_elsewhere(console, processes), None, rewards, watch)


def resume(
    output: Path,
    console: Console,
    *,
    iterations: int | None = None,
    overrides: Sequence[str] = (),
    rewards: RewardSet | None = None,
    watch: Watch | None = None,
) -> Path:
    """Go on with a run from its last checkpoint (from the beginning if it has none), as if it had never stopped.

    Args:
        iterations: where it is to end now, counted from its beginning; None to leave that as it is. Written into the
            run's configuration (:func:`dgpo_plugin.training.identity.replan`).
        overrides: ``section.field=value``, where something is now or what else may change; written there too.
        rewards, watch: as for :func:`train`.

    Returns:
        The adapter's path.

    Raises:
        UserError: no run there, settings that were changed since, or a damaged checkpoint.
        Stopped: as :func:`train`.
    """
    folder = RunFolder(output)
    config, checkpoint = folder.read_config(overrides), folder.last_checkpoint()
    if checkpoint is not None and config.model.precision == "auto":  # stays what it was found to be
        resolved = config.model.model_copy(update={"precision": checkpoint.identity.config["model"]["precision"]})
        config = config.model_copy(update={"model": resolved})
    if iterations is not None:
        done = 0 if checkpoint is None else checkpoint.progress.iteration
        config = replan(config, None if checkpoint is None else checkpoint.identity, done, iterations)
    return _run(config, folder, _quiet_elsewhere(console, join_processes()), checkpoint, rewards, watch)


def _quiet_elsewhere(console: Console, processes: Processes) -> Console:
    return console if processes.is_main else Console(quiet=True)


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    checkpoint: Checkpoint | None,
    rewards: RewardSet | None,
    watch: Watch | None,
) -> Path:
    with console.status("loading the model"):
        trainer = build_trainer(config, rewards=rewards, failures=folder.failures)
        identity, start = identity_of(trainer), progress_of(trainer)
        if checkpoint is not None:
            start = _go_on(trainer, checkpoint, identity, console)
        trainer.processes.on_main(lambda: folder.prepare(trainer.config, trainer.iteration))
        _start_trackers(trainer, folder)
        if watch is not None:
            watch(trainer, None)
        if checkpoint is None:
            start = start.model_copy(update={"reward_before": trainer.held_out_reward()})
    console.print(f"held-out reward of the base: {start.reward_before:.3f}")
    if checkpoint is None:
        _save_samples(trainer, folder)
    else:
        console.print(f"going on after iteration {trainer.iteration}, from {checkpoint.path}", soft_wrap=True)
        if identity.packages != checkpoint.identity.packages:
            console.print("other package versions than before: the result will differ in the last bits")
        for line in rounding_notes(checkpoint.identity, identity):
            console.print(line, soft_wrap=True)
    started = time.perf_counter()
    try:
        after = None
        with contextlib.suppress(StopNow):
            _iterate(trainer, folder, console, identity, start, watch)
            if trainer.iteration >= config.training.iterations:
                after = trainer.held_out_reward()
        trainer.processes.on_main(lambda: _export(trainer, folder, start, after))
    finally:
        trainer.accelerator.end_training()  # trackers, and the process group
    if after is None:
        raise Stopped(
            f"stopped after iteration {trainer.iteration} of {config.training.iterations}, all of it saved; "
            f"go on with: dgpo resume {folder.path}"
        )
    console.print(
        f"held-out reward {start.reward_before:.3f} -> {after:.3f} in {time.perf_counter() - started:.0f} s; "
        f"adapter: {folder.adapter}",
        soft_wrap=True,
    )
    return folder.adapter


def identity_of(trainer: Trainer) -> RunIdentity:
    """What the result of a run depends on; the first process reads what is large, for all.

    Raises:
        UserError: a file that it names cannot be read any more.
    """
    config, rewards, processes = trainer.config, trainer.scorer.rewards, trainer.processes
    return RunIdentity(
        config=config.model_dump(mode="json"),
        base=processes.decided_by_main(lambda: dict(trainer.model.identity)),
        prompts_sha256=prompts_hash(trainer.groups.prompts),
        held_out_sha256=prompts_hash(trainer.held_out.prompts),
        rewards_sha256=rewards.sha256,
        contents=processes.decided_by_main(lambda: contents_of(config, rewards)),
        packages=package_versions(),
    )


def progress_of(trainer: Trainer) -> Progress:
    """Where a run is now."""
    scaler = trainer.accelerator.scaler
    return Progress(
        iteration=trainer.iteration,
        steps=trainer.steps,
        started=creation_date(),
        gradient_scaler={} if scaler is None else dict(scaler.state_dict()),
    )


def restore_run(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Become the run that a checkpoint was taken of."""
    progress, scaler = checkpoint.progress, trainer.accelerator.scaler
    trainer.restore(checkpoint.tensors, progress.iteration, progress.steps)
    if scaler is not None and progress.gradient_scaler:
        scaler.load_state_dict(dict(progress.gradient_scaler))


def _go_on(trainer: Trainer, checkpoint: Checkpoint, identity: RunIdentity, console: Console) -> Progress:
    """Become the run of a checkpoint, if it is this one, and say if its end was moved."""
    check_same_run(checkpoint.identity, identity, checkpoint.path, checkpoint.progress.iteration)
    restore_run(trainer, checkpoint)
    console.print(_moved_end(trainer.config, checkpoint), end="", soft_wrap=True)
    return checkpoint.progress


def _export(trainer: Trainer, folder: RunFolder, start: Progress, after: float | None) -> None:
    facts = TrainingFacts(
        trainer.config,
        trainer.steps,
        reward=trainer.scorer.rewards.title,
        reward_before=start.reward_before,
        reward_after=after,
        date=start.started,
    )
    export_adapter(trainer.policy, trainer.evaluation_weights, folder.adapter, facts)


def _iterate(
    trainer: Trainer,
    folder: RunFolder,
    console: Console,
    identity: RunIdentity,
    start: Progress,
    watch: Watch | None,
) -> None:
    """Train to the end, or until a signal or ``watch`` asks to stop; what is done by then has a checkpoint."""
    config, processes, rewards = trainer.config, trainer.processes, list[float]()
    total, logging = config.training.iterations, config.logging

    def save() -> None:
        told = {"mean_reward": sum(rewards) / len(rewards), "reward_before": start.reward_before}
        progress = progress_of(trainer).model_copy(update={"started": start.started, **told})
        write = functools.partial(
            save_checkpoint, folder.path, identity, progress, trainer.state(), config.checkpoint.keep
        )
        processes.on_main(write)
        rewards.clear()

    log_path = folder.metrics if processes.is_main else Path(os.devnull)
    with (
        progress_bar(console) as bar,
        log_path.open("a", encoding="utf-8") as log,
        stop_signals(bar.console) as signals,
    ):
        task = bar.add_task(config.algorithm.name, total=total, completed=trainer.iteration)
        saved, steps = trainer.iteration, trainer.steps
        try:
            for record in trainer.iterations():
                steps = trainer.steps
                log.write(json.dumps(record) + "\n")
                log.flush()
                trainer.accelerator.log(record, step=trainer.iteration)
                bar.update(task, advance=1)
                for line in (iteration_line(record, trainer.algorithm.METRICS), *constant_reward_lines(record, config)):
                    bar.console.print(line, highlight=False)
                rewards.append(record["reward"])
                if logging.sample_every and trainer.iteration % logging.sample_every == 0:
                    _save_samples(trainer, folder)
                if watch is not None:
                    watch(trainer, record)
                stop = bool(processes.sum(torch.tensor(float(len(signals)), device=trainer.policy.device)))
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


def _save_samples(trainer: Trainer, folder: RunFolder) -> None:
    if not trainer.config.logging.sample_every:
        return
    prompts = trainer.held_out.first(trainer.config.logging.sample_images)
    pictures = trainer.held_out.sample(trainer.evaluation_weights, prompts, seed=1)
    trainer.processes.on_main(lambda: folder.write_samples(trainer.iteration, pictures))


def _start_trackers(trainer: Trainer, folder: RunFolder) -> None:
    trackers = trainer.config.logging.trackers
    if not trackers:
        return
    trainer.accelerator.project_configuration.set_directories(str(folder.path))
    try:
        from accelerate.tracking import filter_trackers

        trainer.accelerator.log_with = filter_trackers(list(trackers), trainer.accelerator.logging_dir)
        trainer.accelerator.init_trackers("dgpo", config={"config": trainer.config.model_dump_json()})
    except (ImportError, ValueError) as error:
        raise UserError(f"logging.trackers: {error}; install the tracker or leave it out") from error


def _moved_end(config: RunConfig, checkpoint: Checkpoint) -> str:
    """A line if the run ends elsewhere than when the checkpoint was written, else nothing."""
    training, done = config.training, checkpoint.progress.iteration
    before = training.model_copy(update={"iterations": checkpoint.identity.config["training"]["iterations"]})
    if before.iterations == training.iterations:
        return ""
    then, now = (plan.rate_at(done / plan.iterations) for plan in (before, training))
    rate = (
        ""
        if training.decay == "none"
        else f"; the learning rate goes from {then:.3g} to {now:.3g} and falls from there"
    )
    return f"the run ends after iteration {training.iterations} instead of {before.iterations}{rate}\n"
