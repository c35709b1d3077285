"""Checkpoints: a folder each, ``checkpoints/000040/`` with state.safetensors and state.json, whole or not there.

Every random draw of a run is seeded by what it is for (:mod:`dgpo_plugin.common.seeding`), so the iteration number is
the whole random state and the prompt position.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from dgpo_plugin.common.errors import UserError, resume_command
from dgpo_plugin.common.files import read_bytes, reason
from dgpo_plugin.training.accept import Change
from dgpo_plugin.training.guard import GuardState
from dgpo_plugin.training.identity import RunIdentity

FOLDER = "checkpoints"
TENSORS, STATE = "state.safetensors", "state.json"
HALF, GONE = ".tmp", ".gone"
"""Ends of the hidden names that a checkpoint has while it is written, and while it is removed."""
FORMAT = 4
"""Of what is written; another one's checkpoints are not read."""


class Progress(BaseModel):
    """What moves while a run goes on.

    Attributes:
        iteration, steps: done.
        mean_reward: of the iterations since the checkpoint before, or with pairs their accuracy; by it the best is
            known.
        reward_before: held-out reward of the base; None where no reward measures it.
        reward_before_note: over how many pictures, where some were not scored; else empty.
        accepted: what was changed knowingly, in order.
        started: when the run was, ISO 8601.
        gradient_scaler: of fp16 training; empty otherwise.
        guard: what the alarm for reward hacking has seen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iteration: int
    steps: int
    mean_reward: float = 0.0
    reward_before: float | None = 0.0
    reward_before_note: str = ""
    accepted: tuple[Change, ...] = ()
    started: str
    gradient_scaler: dict[str, float] = {}
    guard: GuardState = GuardState()


class _State(BaseModel):
    """``state.json``: the run, where it is, and what guards them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(strict=True, ge=FORMAT, le=FORMAT)
    identity: RunIdentity
    progress: Progress
    tensors_sha256: str = ""
    sha256: str = ""

    def signed(self) -> _State:
        """The same state with the hash of everything else in ``sha256``."""
        text = self.model_copy(update={"sha256": ""}).model_dump_json()
        return self.model_copy(update={"sha256": hashlib.sha256(text.encode()).hexdigest()})


@dataclass(frozen=True)
class Checkpoint:
    """One read back.

    Attributes:
        tensors: by copy (``policy``, ``evaluation``, ``old``, ``optimizer.exp_avg``, ...), by the adapter's parameter.
    """

    path: Path
    identity: RunIdentity
    progress: Progress
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    run: Path, identity: RunIdentity, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write a checkpoint under ``run`` and prune the others to the ``keep`` newest and the best.

    Raises:
        UserError: the disk is full or cannot be written, or the run's folder is gone; the checkpoints from before are
            as they were.
    """
    folder = run / FOLDER
    final = folder / f"{progress.iteration:06d}"
    temporary = folder / f".{final.name}{HALF}"
    flat = {f"{copy}/{name}": t.contiguous().cpu() for copy, named in tensors.items() for name, t in named.items()}
    blob = save(flat)
    digest = hashlib.sha256(blob).hexdigest()
    state = _State(format=FORMAT, identity=identity, progress=progress, tensors_sha256=digest).signed()
    try:
        remove_halves(run)
        folder.mkdir(exist_ok=True)  # and not the run's own, which somebody may have moved away meanwhile
        temporary.mkdir()
        write_synced(temporary / TENSORS, blob)
        write_synced(temporary / STATE, (state.model_dump_json(indent=1) + "\n").encode())
        _sync_folder(temporary)
        if final.exists():  # an iteration done again, after the run was told to go on from an older one
            _remove(final)
        os.rename(temporary, final)
        _sync_folder(folder)
        _prune(run, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {final}: {reason(error)}; {_cure(error)}, then go on with: {resume_command(run)}"
        ) from error
    return final


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("[0-9]*") if path.is_dir())


def remove_halves(run: Path) -> None:
    """Remove what killed processes left of checkpoints: half written, or half removed.

    Raises:
        OSError: they cannot be.
    """
    for stale in (run / FOLDER).glob(".[0-9]*"):
        if stale.suffix in (HALF, GONE):
            shutil.rmtree(stale)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint back, with every bit checked.

    Raises:
        UserError: a file is missing, truncated or altered; names the checkpoint before, which is still usable.
    """
    try:
        text = read_bytes(path / STATE)
        blob = read_bytes(path / TENSORS)
        _refuse_other_format(path, text)
        state = _State.model_validate_json(text)
    except OSError as error:
        raise _damaged(path, f"{Path(error.filename or path).name}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # pydantic's is one
        raise _damaged(path, f"{STATE} cannot be read") from error
    if state != state.signed():
        raise _damaged(path, f"{STATE} is not what was written")
    if hashlib.sha256(blob).hexdigest() != state.tensors_sha256:
        raise _damaged(path, f"{TENSORS} is not what was written")
    try:
        flat = load(blob)
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"{TENSORS}: {error}") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        copy, _, name = key.partition("/")
        tensors.setdefault(copy, {})[name] = tensor
    return Checkpoint(path, state.identity, state.progress, tensors)


def _refuse_other_format(path: Path, text: bytes) -> None:
    values = json.loads(text)
    if isinstance(values, dict) and "identity" in values and values.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path}: was written by another version of dgpo-plugin (format {values.get('format')!r}, not "
            f"{FORMAT}); "
            f"go on with that version, or start a new run with `dgpo train`"
        )


def _damaged(path: Path, what: str) -> UserError:
    before = [other for other in checkpoints(path.parent.parent) if other.name < path.name]
    then = f"go on from {before[-1].name}" if before else "start from the beginning"
    return UserError(f"checkpoint {path} is damaged ({what}); remove that folder to {then}")


def _cure(error: OSError) -> str:
    """What a user can do about a checkpoint that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make that folder writable"
    return "see to that disk, or copy the run's folder to another one"


def write_synced(path: Path, content: bytes) -> None:
    """Write a file, and have it on the disk before going on."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""What file systems answer that know no such thing of a folder (CIFS, some of FUSE's); PostgreSQL's ``fsync_fname``
ignores EBADF and EINVAL there too, and these where a folder cannot even be opened."""
NO_FOLDER_HANDLE = (errno.EISDIR, errno.EACCES)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder outlive a power cut; not every system can, and none is lost to that.

    Raises:
        OSError: the disk itself failed.
    """
    if os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in NO_FOLDER_HANDLE:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _prune(run: Path, keep: int) -> None:
    found = checkpoints(run)
    if len(found) <= keep:
        return
    rewards = {}
    for path in found:
        try:
            rewards[path] = _State.model_validate_json(read_bytes(path / STATE)).progress.mean_reward
        except (OSError, ValidationError, ValueError):
            continue  # damaged: left for its owner to look at
    kept = {*found[-keep:], max(rewards, key=lambda path: rewards[path], default=None)}
    for path in set(rewards) - kept:
        _remove(path)


def _remove(path: Path) -> None:
    """Out of sight first, so that no half of a checkpoint is ever taken for one."""
    hidden = path.with_name(f".{path.name}{GONE}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
