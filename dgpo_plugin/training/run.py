"""A training run, started or gone on with: the loop of :mod:`~dgpo_plugin.training.trainer`, kept in a folder."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dgpo_plugin.adapters.save import TrainingFacts, changes_nothing, export_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError, resume_command
from dgpo_plugin.common.folder_lock import HeldFolder, only_process
from dgpo_plugin.common.provenance import creation_date, package_versions
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.places import absolute_places, lost_places
from dgpo_plugin.distributed.processes import FailedTogether, Processes, join_processes
from dgpo_plugin.prompts.files import prompts_hash
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.training.accept import MEASURED_WITH, Change, parts_named, refuse_misfit
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import Checkpoint, Progress, save_checkpoint
from dgpo_plugin.training.contents import contents_of
from dgpo_plugin.training.guard import COPY, GuardState, guard_lines, stopped_line, without_copy
from dgpo_plugin.training.identity import RunIdentity, check_same_run, replan, rounding_notes
from dgpo_plugin.training.pair_files import pairs_hash
from dgpo_plugin.training.progress import overlap_lines, progress_bar, record_lines
from dgpo_plugin.training.run_folder import RunFolder, last_logged
from dgpo_plugin.training.signals import stop_signals
from dgpo_plugin.training.trackers import Trackers, start_trackers, training_ended
from dgpo_plugin.training.trainer import Trainer
from dgpo_plugin.training.unscored import HeldOutMean

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
        UserError: whatever of the configuration cannot be had, a folder that cannot be written, or in which another
            process is at work.
        Stopped: by such a signal.
    """
    processes, folder = join_processes(config.training.process_timeout), RunFolder(output)
    processes.on_main(folder.check_writable)
    with _alone_in(folder, processes) as folder:
        processes.on_main(folder.check_new)
        config = absolute_places(config, Path.cwd())
        return _run(config, folder, _quiet_elsewhere(console, processes), None, rewards, watch)


def resume(
    output: Path,
    console: Console,
    *,
    iterations: int | None = None,
    accept: Sequence[str] = (),
    overrides: Sequence[str] = (),
    rewards: RewardSet | None = None,
    watch: Watch | None = None,
) -> Path:
    """Go on with a run from its last checkpoint (from the beginning if it has none), as if it had never stopped.

    Args:
        iterations: where it is to end now, counted from its beginning; None to leave that as it is. Written into the
            run's configuration (:func:`dgpo_plugin.training.identity.replan`).
        accept: parts in which it is knowingly another run from here on (:mod:`dgpo_plugin.training.accept`), such as
            ``["prompts", "reward"]``.
        overrides: ``section.field=value``, where something is now or what else may change; written there too.
        rewards, watch: as for :func:`train`.

    Returns:
        The adapter's path.

    Raises:
        UserError: no run there, settings that were changed since, a damaged checkpoint, or another process that is at
            work there.
        Stopped: as :func:`train`.
    """
    folder, accepted = RunFolder(output), parts_named(accept)
    config = folder.read_config()  # before a lock is laid where there is no run
    processes = join_processes(config.training.process_timeout)
    with _alone_in(folder, processes) as folder:
        config, checkpoint = folder.read_config(overrides), folder.last_checkpoint()
        if lost := lost_places(config):
            told = "; ".join(f"{key}: nothing is at {place} any more" for key, place in lost.items())
            there = " ".join(f"--set {key}=..." for key in lost)
            raise UserError(f"{told}; say where it is now: {resume_command(output)} {there}")
        if checkpoint is not None and config.model.precision == "auto":  # stays what it was found to be
            resolved = config.model.model_copy(update={"precision": checkpoint.identity.config["model"]["precision"]})
            config = config.model_copy(update={"model": resolved})
        if iterations is not None:
            done = 0 if checkpoint is None else checkpoint.progress.iteration
            config = replan(config, None if checkpoint is None else checkpoint.identity, done, iterations)
        return _run(config, folder, _quiet_elsewhere(console, processes), checkpoint, rewards, watch, accepted)


@contextlib.contextmanager
def _alone_in(folder: RunFolder, processes: Processes) -> Iterator[RunFolder]:
    """Keep other runs out of a folder while the block runs; the main process does it for all of this one's."""
    with contextlib.ExitStack() as stack:
        held: list[HeldFolder] = []
        processes.on_main(lambda: held.append(stack.enter_context(only_process(folder.path))))
        yield replace(folder, held=held[0] if held else None)


def _quiet_elsewhere(console: Console, processes: Processes) -> Console:
    return console if processes.is_main else Console(quiet=True)


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    checkpoint: Checkpoint | None,
    rewards: RewardSet | None,
    watch: Watch | None,
    accepted: Collection[str] = (),
) -> Path:
    with console.status("loading the model"):
        trainer = build_trainer(config, rewards=rewards, failures=folder.failures)
        identity, start = identity_of(trainer), progress_of(trainer)
        if checkpoint is not None:
            start = _go_on(trainer, checkpoint, identity, accepted, console)
        trackers = _start_trackers(trainer, folder)  # they look at the metrics, which are then trimmed
        trainer.processes.on_main(lambda: folder.prepare(trainer.config, trainer.iteration))
        if watch is not None:
            watch(trainer, None)
        if checkpoint is None:
            start = _with_base(start, trainer)
    name = trainer.held_out.reward_name
    for line in overlap_lines(trainer.groups.prompts, trainer.held_out.prompts, trainer.config):
        console.print(line, soft_wrap=True, highlight=False)
    if start.reward_before is not None:
        console.print(f"{name} of the base: {_reward_before(start)}")
    if checkpoint is None:
        _save_samples(trainer, folder)
    else:
        console.print(f"going on after iteration {trainer.iteration}, from {checkpoint.path}", soft_wrap=True)
        if identity.packages != checkpoint.identity.packages:
            console.print("other package versions than before: the result will differ in the last bits")
        for line in rounding_notes(checkpoint.identity, identity):
            console.print(line, soft_wrap=True)
        if trainer.processes.decided_by_main(lambda: folder.lacks_samples(trainer.iteration, config)):
            _save_samples(trainer, folder)  # the disk took the checkpoint, and not the pictures
    started = time.perf_counter()
    after, ranked, done = None, "", False
    with training_ended(trainer.accelerator):
        with contextlib.suppress(StopNow):
            _iterate(trainer, folder, console, identity, start, trackers, watch)
            if trainer.iteration >= config.training.iterations or trainer.stopped:
                after, done = trainer.held_out_reward() if trainer.is_judged else None, True
                ranked = trainer.held_out_pairs.line(trainer.average_now()) if trainer.held_out_pairs else ""
        trainer.processes.on_main(lambda: _export(trainer, folder, start, after, console))
    if not done:
        raise Stopped(
            f"stopped after iteration {trainer.iteration} of {config.training.iterations}, all of it saved; "
            f"go on with: {resume_command(folder.path)}"
        )
    if trainer.guard is not None and trainer.stopped:
        console.print(stopped_line(trainer.guard), soft_wrap=True, highlight=False)
    measured = "" if after is None else f"{name} {_reward_before(start)} -> {after} in "
    if ranked:
        console.print(ranked)
    console.print(f"{measured}{time.perf_counter() - started:.0f} s; adapter: {folder.adapter}", soft_wrap=True)
    return folder.adapter


def identity_of(trainer: Trainer) -> RunIdentity:
    """What the result of a run depends on; the first process reads what is large, for all.

    Raises:
        UserError: a file that it names cannot be read any more.
    """
    config, rewards, processes, pairs = trainer.config, trainer.scorer.rewards, trainer.processes, trainer.pairs
    return RunIdentity(
        config=config.model_dump(mode="json"),
        base=processes.decided_by_main(lambda: dict(trainer.model.identity)),
        prompts_sha256=prompts_hash(trainer.groups.prompts),
        held_out_sha256=prompts_hash(trainer.held_out.prompts),
        rewards_sha256=rewards.sha256,
        pairs_sha256=pairs_hash(pairs.train) if pairs else "",
        held_out_pairs_sha256=pairs_hash(pairs.held_out) if pairs and pairs.held_out else "",
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
        guard=GuardState() if trainer.guard is None else trainer.guard.state,
    )


def restore_run(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Become the run that a checkpoint was taken of."""
    progress, scaler = checkpoint.progress, trainer.accelerator.scaler
    trainer.restore(checkpoint.tensors, progress.iteration, progress.steps)
    if trainer.guard is not None:
        trainer.guard.restore(progress.guard, checkpoint.tensors.get(COPY, {}))
    if scaler is not None and progress.gradient_scaler:
        scaler.load_state_dict(dict(progress.gradient_scaler))


def _go_on(
    trainer: Trainer, checkpoint: Checkpoint, identity: RunIdentity, accepted: Collection[str], console: Console
) -> Progress:
    """Become the run of a checkpoint, if it is this one but for what is accepted; say that, and a moved end."""
    progress = checkpoint.progress
    differences = check_same_run(checkpoint.identity, identity, checkpoint.path, progress.iteration, accepted)
    refuse_misfit(without_copy(checkpoint.tensors), without_copy(trainer.state()), checkpoint.path)
    changes = [Change.accepted(difference, progress.iteration) for difference in differences]
    for change in changes:
        console.print(f"accepted: {change}", soft_wrap=True, highlight=False)
    if any(difference.part in MEASURED_WITH for difference in differences):
        # Or the card would compare the adapter with a base that was measured otherwise. It is still the base here.
        progress = _with_base(progress, trainer)
    restore_run(trainer, checkpoint)
    console.print(_moved_end(trainer.config, checkpoint), end="", soft_wrap=True)
    return progress.model_copy(update={"accepted": (*progress.accepted, *changes)})


def _with_base(start: Progress, trainer: Trainer) -> Progress:
    """With the held-out reward of the base, which the evaluation weights of a trainer without a step are."""
    if not trainer.is_judged:
        return start.model_copy(update={"reward_before": None})
    base = trainer.held_out_reward()
    return start.model_copy(update={"reward_before": base.value, "reward_before_note": base.note})


def _reward_before(start: Progress) -> str:
    note = start.reward_before_note
    return f"{start.reward_before:.3f}" + (f" ({note})" if note else "")


def _export(trainer: Trainer, folder: RunFolder, start: Progress, after: HeldOutMean | None, console: Console) -> None:
    weights = trainer.average_now()
    if changes_nothing(weights):
        console.print(f"the adapter is all zeros and changes nothing: {why_zero(trainer, folder)}", soft_wrap=True)
    facts = TrainingFacts(
        trainer.config,
        trainer.exported_steps,
        reward=trainer.scorer.rewards.title,
        reward_before=start.reward_before,
        reward_after=None if after is None else after.value,
        measured_on=trainer.held_out.called,
        reward_before_note=start.reward_before_note,
        reward_after_note="" if after is None else after.note,
        accepted=[str(change) for change in start.accepted],
        guard="" if trainer.guard is None else trainer.guard.told,
        date=start.started,
    )
    folder.check_there()
    export_adapter(trainer.policy, weights, folder.adapter, facts)


def why_zero(trainer: Trainer, folder: RunFolder) -> str:
    """Why a run's adapter is as it was at the start, for people."""
    done = f"{trainer.iteration} iteration{'' if trainer.iteration == 1 else 's'}"
    if not trainer.iteration:
        return "no iteration was done"
    if trainer.steps:
        rate = trainer.config.training.learning_rate
        return f"training.learning_rate {rate:g} is too small to move a weight of 0 in {done}; raise it"
    records = folder.read_metrics()
    if records and all(record.get("constant_groups") == 1 for record in records):
        return f"no optimizer step was done in {done}, for the rewards were the same inside every prompt group"
    cause = "zero" if trainer.accelerator.scaler is None else "zero or, in fp16, not finite"
    return f"no optimizer step was done in {done}, for every gradient was {cause}"


def _iterate(
    trainer: Trainer,
    folder: RunFolder,
    console: Console,
    identity: RunIdentity,
    start: Progress,
    trackers: Trackers,
    watch: Watch | None,
) -> None:
    """Train to the end, or until a signal or ``watch`` asks to stop; what is done by then has a checkpoint."""
    config, processes, rewards = trainer.config, trainer.processes, list[float]()
    total, logging = config.training.iterations, config.logging

    def save() -> None:
        progress = start.model_copy(update={"mean_reward": sum(rewards) / len(rewards)})
        _save(trainer, folder, identity, progress)
        rewards.clear()

    with progress_bar(console) as bar, stop_signals(bar.console) as signals:
        task = bar.add_task(config.algorithm.name, total=total, completed=trainer.iteration)
        saved, steps = trainer.iteration, trainer.steps
        try:
            for record in trainer.iterations():
                steps = trainer.steps
                rewards.append(record.get(trainer.quality, 0.0))
                processes.on_main(functools.partial(_log, folder, trackers, record))
                bar.update(task, advance=1)
                for line in record_lines(record, trainer.algorithm.METRICS, config, folder.failures):
                    bar.console.print(line, highlight=False, soft_wrap=True)
                for line in guard_lines(trainer.guard, trainer.iteration):
                    bar.console.print(line, highlight=False, soft_wrap=True)
                if logging.sample_every and trainer.iteration % logging.sample_every == 0:
                    _save_samples(trainer, folder)
                if watch is not None:
                    watch(trainer, record)
                stop = bool(processes.sum(torch.tensor(float(len(signals)), device=trainer.policy.device)))
                last = trainer.iteration == total or trainer.stopped
                if stop or last or trainer.iteration % config.checkpoint.every == 0:
                    saved = trainer.iteration  # or that it was tried
                    save()
                if stop:
                    return
        except (StopNow, UserError) as error:
            together = processes.count == 1 or isinstance(error, StopNow | FailedTogether)
            # Of an iteration with several updates the first may be done: then only the checkpoint before is exact.
            if together and trainer.iteration > saved and trainer.steps == steps:
                save()
                bar.console.print(
                    f"saved after iteration {trainer.iteration}; go on with: {resume_command(folder.path)}"
                )
            raise


def _log(folder: RunFolder, trackers: Trackers, record: dict[str, float]) -> None:
    folder.log(record)
    trackers.log(record, int(record["iteration"]))


def _save(trainer: Trainer, folder: RunFolder, identity: RunIdentity, told: Progress) -> None:
    """Write a checkpoint of where the run is; what does not move with the iterations is as in ``told``."""
    told_of = {name: value for name, value in told if name not in ("iteration", "steps", "gradient_scaler", "guard")}
    progress = progress_of(trainer).model_copy(update=told_of)
    keep = trainer.config.checkpoint.keep
    state = trainer.state()

    def write() -> None:
        folder.check_there()
        save_checkpoint(folder.path, identity, progress, state, keep)

    trainer.processes.on_main(write)


def _save_samples(trainer: Trainer, folder: RunFolder) -> None:
    if not trainer.config.logging.sample_every:
        return
    prompts = trainer.held_out.first(trainer.config.logging.sample_images)
    pictures = trainer.held_out.sample(trainer.average_now(), prompts, seed=1)
    trainer.processes.on_main(lambda: folder.write_samples(trainer.iteration, pictures))


def _start_trackers(trainer: Trainer, folder: RunFolder) -> Trackers:
    names, done = trainer.config.logging.trackers, trainer.iteration
    if not names:
        return Trackers()
    logged = last_logged(folder.metrics)
    return start_trackers(trainer.accelerator, names, folder.path, done, logged, trainer.config.model_dump_json())


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
