"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, samples/ and, at the end, adapter.safetensors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor

from dgpo_plugin.common.errors import UserError, resume_command
from dgpo_plugin.common.files import atomic_path, read_bytes, remove_temporaries, write_text_atomically, writing
from dgpo_plugin.common.folder_lock import HeldFolder
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import apply_override, load_config, parse_config
from dgpo_plugin.config.places import absolute_places, places_in
from dgpo_plugin.training.checkpoint import Checkpoint, checkpoints, load_checkpoint, remove_halves


@dataclass(frozen=True)
class RunFolder:
    """Where a run is, and what lies there.

    Attributes:
        held: that this process alone writes there; None where it only reads, and in processes beside the first.
    """

    path: Path
    held: HeldFolder | None = None

    @property
    def config(self) -> Path:
        """The whole configuration, resolved."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A JSON line for each iteration."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """What the run is for."""
        return self.path / "adapter.safetensors"

    @property
    def samples(self) -> Path:
        """Pictures drawn on the way."""
        return self.path / "samples"

    @property
    def failures(self) -> Path:
        """Pictures and prompts of a reward that failed for good."""
        return self.path / "failed-reward"

    def check_new(self) -> None:
        """Find out that there is a run already before the model is loaded.

        Raises:
            UserError: the folder holds a run.
        """
        if self.config.exists():
            raise UserError(
                f"output {self.path}: holds a run already; go on with it by `{resume_command(self.path)}`, or choose "
                f"another --output"
            )

    def check_writable(self) -> None:
        """Find out that a run cannot be written before the model is loaded.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        existing = self.path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"cannot write {self.path}: {existing} is not a writable folder; choose another --output")

    def read_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The configuration of the run that is there, with absolute paths.

        Args:
            overrides: ``section.field=value`` on top, whose paths are relative to the working directory.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if not self.config.exists():
            raise UserError(f"{self.path}: holds no run (no {self.config.name}); start one with `dgpo train`")
        written = load_config(str(self.config))
        config = absolute_places(written, self.path)
        if overrides:
            values = config.model_dump(mode="json")
            for override in overrides:
                apply_override(values, override)
            config = parse_config(values, str(self.config))
        return absolute_places(config, Path.cwd())

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration, places inside the folder relative to it."""
        values = places_in(config, self.path).model_dump(mode="json")
        write_text_atomically(self.config, yaml.safe_dump(values, sort_keys=False))

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint; None if there is none.

        Raises:
            UserError: it is damaged.
        """
        found = checkpoints(self.path)
        return load_checkpoint(found[-1]) if found else None

    def check_there(self) -> None:
        """Find out that the folder was taken away.

        Raises:
            UserError: it was removed, moved or made anew while the run was at work there.
        """
        if self.held is not None:
            self.held.check()

    def prepare(self, config: RunConfig, iteration: int) -> None:
        """Write the configuration, and leave out of the metrics what is about to be done again.

        What killed processes left half-written is removed.
        """
        self.check_there()
        for folder in (self.samples, self.failures):
            remove_temporaries(folder)
        with writing(self.path):
            remove_halves(self.path)
        # Written anew only if it says something else now: else it is as its owner left it.
        if not self.config.exists() or self.read_config() != config:
            self.write_config(config)
        trim_metrics(self.metrics, iteration)

    def read_metrics(self) -> list[dict[str, float]]:
        """The records of the iterations that are done, as far as they can be read."""
        return [record for record, _ in _records(self.metrics)]

    def log(self, record: Mapping[str, float]) -> None:
        """Add an iteration's line to the metrics."""
        self.check_there()
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def lacks_samples(self, iteration: int, config: RunConfig) -> bool:
        """Whether pictures were to be drawn after an iteration, and are not there."""
        every = config.logging.sample_every
        return bool(every) and iteration % every == 0 and not self._samples_of(iteration).exists()

    def _samples_of(self, iteration: int) -> Path:
        return self.samples / f"{iteration:06d}.png"

    def write_samples(self, iteration: int, pictures: Tensor) -> None:
        """Write a grid of pictures, (N, 3, H, W) in [0, 1], of after an iteration."""
        self.check_there()
        with atomic_path(self._samples_of(iteration)) as temporary:
            image_grid(pictures, columns=min(8, len(pictures))).save(temporary)


def trim_metrics(path: Path, iteration: int) -> None:
    """Leave out of metrics.jsonl what comes after an iteration and is about to be done again.

    And what is no record: a line cut by a kill, or damaged. It is a log, and no reason not to go on.
    """
    kept = [line + "\n" for record, line in _records(path) if int(record["iteration"]) <= iteration]
    write_text_atomically(path, "".join(kept))


def last_logged(path: Path) -> int:
    """The last iteration in metrics.jsonl; 0 if there is none."""
    return max((int(record["iteration"]) for record, _ in _records(path)), default=0)


def _records(path: Path) -> Iterator[tuple[dict[str, float], str]]:
    """The records of metrics.jsonl, each with its line; what is no record is passed over."""
    try:
        text = read_bytes(path).decode("utf-8", "replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; move it away, it is a log that a new one can follow") from error
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line)
            int(record["iteration"])
            yield record, line
