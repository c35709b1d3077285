"""Checkpoints: a folder each, ``checkpoints/000040/`` with state.safetensors and state.json, whole or not there.

Every random draw of a run is seeded by what it is for (:mod:`dgpo_plugin.common.seeding`), so the iteration number is
the whole random state and the prompt position.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig

FOLDER = "checkpoints"
TENSORS, STATE = "state.safetensors", "state.json"
MAY_CHANGE = (
    "logging.",
    "checkpoint.",
    "training.iterations",
    "training.replanned",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "model.offload",
    "model.shard",
    "scoring.retries",
    "scoring.timeout",
)
"""Settings that a resumed run may have others of: how long, how loud, in how many pieces."""


class State(BaseModel):
    """``state.json``.

    Attributes:
        iteration, steps: done.
        mean_reward: of the iterations since the checkpoint before; by it the best is known.
        reward_before: held-out reward of the base.
        started: when the run was, ISO 8601.
        config: the run's, as in config.yaml.
        base_weights_hash, prompts_sha256, reward_sha256, packages: what else the result depends on.
        gradient_scaler: of fp16 training; empty otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    iteration: int
    steps: int
    mean_reward: float = 0.0
    reward_before: float = 0.0
    started: str
    config: dict[str, Any]
    base_weights_hash: str
    prompts_sha256: str
    reward_sha256: str = ""
    packages: dict[str, str]
    gradient_scaler: dict[str, float] = {}
    tensors_sha256: str = ""
    sha256: str = ""

    def signed(self) -> State:
        """With the hash of everything else in ``sha256``."""
        text = self.model_copy(update={"sha256": ""}).model_dump_json()
        return self.model_copy(update={"sha256": hashlib.sha256(text.encode()).hexdigest()})


@dataclass(frozen=True)
class Checkpoint:
    """One read back, its tensors by copy: ``policy``, ``evaluation``, ``old``, ``optimizer.exp_avg``, ..."""

    path: Path
    state: State
    tensors: dict[str, list[Tensor]]


def save_checkpoint(run: Path, state: State, tensors: Mapping[str, Sequence[Tensor]], keep: int) -> Path:
    """Write a checkpoint under ``run`` and prune the others to the ``keep`` newest and the best.

    Raises:
        UserError: the disk is full or cannot be written; the checkpoints from before are as they were.
    """
    folder = run / FOLDER
    final = folder / f"{state.iteration:06d}"
    temporary = folder / f".{final.name}.tmp"
    blob = save({f"{name}.{i:05d}": t.contiguous().cpu() for name, ts in tensors.items() for i, t in enumerate(ts)})
    state = state.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest()}).signed()
    try:
        for stale in folder.glob(".*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        _write(temporary / TENSORS, blob)
        _write(temporary / STATE, (state.model_dump_json(indent=1) + "\n").encode())
        _sync_folder(temporary)
        if final.exists():  # an iteration done again, after the run was told to go on from an older one
            _remove(final)
        os.rename(temporary, final)
        _sync_folder(folder)
        _prune(run, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {final}: {error.strerror}; make room, then go on with: dgpo resume {run}"
        ) from error
    return final


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("[0-9]*") if path.is_dir())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint back, with every bit checked.

    Raises:
        UserError: a file is missing, truncated or altered; names the checkpoint before, which is still usable.
    """
    try:
        state = State.model_validate_json((path / STATE).read_bytes())
        blob = (path / TENSORS).read_bytes()
    except OSError as error:
        raise _damaged(path, f"{Path(error.filename).name}: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise _damaged(path, f"{STATE} cannot be read") from error
    if state != state.signed():
        raise _damaged(path, f"{STATE} is not what was written")
    if hashlib.sha256(blob).hexdigest() != state.tensors_sha256:
        raise _damaged(path, f"{TENSORS} is not what was written")
    try:
        flat = load(blob)
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"{TENSORS}: {error}") from error
    tensors: dict[str, list[Tensor]] = {}
    for key in sorted(flat):
        tensors.setdefault(key.rpartition(".")[0], []).append(flat[key])
    return Checkpoint(path, state, tensors)


def check_same_run(checkpoint: Checkpoint, now: State) -> None:
    """Refuse to go on with other settings, prompts or another base than the checkpoint was trained with.

    Raises:
        UserError: names the first thing that differs.
    """
    then, advice = checkpoint.state, "put it back, or start a new run with `dgpo train`"
    settings, before = _flat(now.config), _flat(then.config)
    _check_end(checkpoint, now)
    for key in sorted({*settings, *before}):
        if settings.get(key) != before.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"config.yaml: {key} is {settings.get(key)!r}, but {checkpoint.path} was trained with "
                f"{before.get(key)!r}; {advice}"
            )
    if then.base_weights_hash != now.base_weights_hash:
        raise UserError(f"the base model's weights are not those that {checkpoint.path} was trained on; {advice}")
    if then.prompts_sha256 != now.prompts_sha256:
        raise UserError(f"the prompts are not those that {checkpoint.path} was trained on; {advice}")
    if then.reward_sha256 != now.reward_sha256:
        raise UserError(f"the reward's file is not the one that {checkpoint.path} was trained with; {advice}")


def replan(config: RunConfig, checkpoint: Checkpoint | None, iterations: int) -> RunConfig:
    """The run with its end elsewhere: ``iterations`` in all.

    A learning rate that falls to the end follows, from the checkpoint on, the line of a run that long. That is neither
    the run that was planned nor one that was so long from the start, so ``training.replanned`` says it.

    Raises:
        UserError: the checkpoint is beyond that end.
    """
    if checkpoint is not None and iterations < checkpoint.state.iteration:
        raise UserError(f"--iterations {iterations}: {checkpoint.path} is beyond that; give more")
    changes: dict[str, Any] = {"iterations": iterations}
    if checkpoint is not None and config.training.decay != "none":
        planned, before = _plan(checkpoint)
        moved = iterations != planned and checkpoint.state.iteration > 0
        changes["replanned"] = (*before, (checkpoint.state.iteration, planned)) if moved else before
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _plan(checkpoint: Checkpoint) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Where the run was to end when the checkpoint was written, and how often that had been moved."""
    training = checkpoint.state.config["training"]
    return training["iterations"], tuple((done, planned) for done, planned in training.get("replanned", []))


def _check_end(checkpoint: Checkpoint, now: State) -> None:
    """A falling learning rate depends on where the run ends, which only :func:`replan` may move."""
    training = now.config["training"]
    planned, before = _plan(checkpoint)
    recorded = tuple((done, planned) for done, planned in training["replanned"])
    as_planned = training["iterations"] == planned and recorded == before
    if training["decay"] == "none" or as_planned or recorded == (*before, (checkpoint.state.iteration, planned)):
        return
    raise UserError(
        f"config.yaml: training.iterations is {training['iterations']}, but {checkpoint.path} was trained with "
        f"{planned}, to which its learning rate falls; put it back, or move the end with: "
        f"dgpo resume {checkpoint.path.parent.parent} --iterations {training['iterations']}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _damaged(path: Path, what: str) -> UserError:
    before = [other for other in checkpoints(path.parent.parent) if other.name < path.name]
    then = f"go on from {before[-1].name}" if before else "start from the beginning"
    return UserError(f"checkpoint {path} is damaged ({what}); remove that folder to {then}")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder outlive a power cut; not every system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(run: Path, keep: int) -> None:
    found = checkpoints(run)
    if len(found) <= keep:
        return
    rewards = {}
    for path in found:
        try:
            rewards[path] = State.model_validate_json((path / STATE).read_bytes()).mean_reward
        except (OSError, ValidationError, ValueError):
            continue  # damaged: left for its owner to look at
    kept = {*found[-keep:], max(rewards, key=lambda path: rewards[path])}
    for path in set(rewards) - kept:
        _remove(path)


def _remove(path: Path) -> None:
    """Out of sight first, so that no half of a checkpoint is ever taken for one."""
    hidden = path.with_name(f".{path.name}.gone")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
