"""A training run on disk: a folder with config.yaml, metrics.jsonl, samples/ and, at the end, adapter.safetensors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dgpo_plugin.config import RunConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.export import export_adapter
from dgpo_plugin.files import atomic_path, write_text_atomically
from dgpo_plugin.sampling import image_grid
from dgpo_plugin.trainer import Trainer

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.yaml"


def check_folder(output: Path) -> None:
    """Find out that a run cannot be written before the model is loaded.

    Raises:
        UserError: the folder holds a run already, or cannot be made or written to.
    """
    if (output / CONFIG_FILE).exists():
        raise UserError(f"output {output}: holds a run already; choose another --output or remove it")
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {output}: {existing} is not a writable folder; choose another --output")


def train(config: RunConfig, output: Path, console: Console) -> Path:
    """Train and write the adapter; Ctrl-C writes what there is and raises KeyboardInterrupt again.

    Returns:
        The adapter's path.
    """
    check_folder(output)
    with console.status("loading the model"):
        trainer = Trainer(config)
        config_text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_text_atomically(output / CONFIG_FILE, config_text)
        _start_trackers(trainer, config, output)
        before = trainer.held_out_reward()
    console.print(f"held-out reward of the base: {before:.3f}")
    _save_samples(trainer, config, output, 0)
    adapter = output / ADAPTER_FILE
    started = time.perf_counter()
    after: float | None = None
    try:
        with _progress(console) as bar, (output / "metrics.jsonl").open("w", encoding="utf-8") as log:
            task = bar.add_task(config.algorithm.name, total=config.training.iterations)
            for record in trainer.iterations():
                log.write(json.dumps(record) + "\n")
                log.flush()
                trainer.accelerator.log(record, step=int(record["iteration"]))
                bar.update(task, advance=1)
                bar.console.print(_line(record), highlight=False)
                every = config.logging.sample_every
                if every and record["iteration"] % every == 0:
                    _save_samples(trainer, config, output, int(record["iteration"]))
        after = trainer.held_out_reward()
    finally:
        trainer.accelerator.end_training()
        if trainer.steps:
            export_adapter(
                trainer.policy,
                trainer.evaluation_weights,
                adapter,
                config,
                steps=trainer.steps,
                reward_before=before,
                reward_after=after,
            )
    console.print(
        f"held-out reward {before:.3f} -> {after:.3f} in {time.perf_counter() - started:.0f} s; adapter: {adapter}",
        soft_wrap=True,
    )
    return adapter


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


def _save_samples(trainer: Trainer, config: RunConfig, output: Path, iteration: int) -> None:
    count = config.logging.sample_images
    if not config.logging.sample_every:
        return
    prompts = [trainer.held_out[index % len(trainer.held_out)] for index in range(count)]
    grid = image_grid(trainer.sample(prompts, seed=1), columns=min(8, count))
    with atomic_path(output / "samples" / f"{iteration:06d}.png") as temporary:
        grid.save(temporary)


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


def _line(record: dict[str, float]) -> str:
    return (
        f"iteration {record['iteration']:4.0f}  reward {record['reward']:.3f}  "
        f"group std {record['reward_group_std']:.3f}  clipped {record['clip_fraction']:5.1%}  "
        f"kl {record['kl']:.4f}  {record['seconds']:.2f} s"
    )
