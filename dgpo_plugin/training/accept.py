"""What was changed knowingly in the middle of a run: ``dgpo resume RUN --accept prompts,reward``, and its record.

A prompt that was mended, a reward that was, another learning rate: the run goes on with it from its last checkpoint,
and its state and its adapter say what was changed, and when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dgpo_plugin.common.errors import UserError, did_you_mean, resume_command
from dgpo_plugin.config.fields import RunConfig

OTHERWISE = {"rewards": "reward", "scoring": "reward"}
"""What a change in a section of the configuration is accepted as, where that is not the section's name."""
ALWAYS_FREE = ("logging", "checkpoint")
ACCEPTABLE = tuple(
    dict.fromkeys(OTHERWISE.get(name, name) for name in RunConfig.model_fields if name not in ALWAYS_FREE)
)
"""What ``--accept`` may name: what a run's result depends on, in parts."""
MEASURED_WITH = ("model", "prompts", "reward", "evaluation")
"""Of those, what the held-out reward depends on, beside the adapter."""
BASE = "base's "
"""Begins what a part of the base is called."""
HASH, SHOWN = re.compile("[0-9a-f]{40,}"), 12
"""A content hash, and how many of its digits people are shown."""


@dataclass(frozen=True)
class Difference:
    """Something that is not as a checkpoint was trained with.

    Attributes:
        part: of :data:`ACCEPTABLE`.
        what: a setting by its key, or a noun for what has a hash.
        before, now: the setting's values as JSON, or the hashes, empty where there is none.
        told: a sentence that names it, and a setting's values.
    """

    part: str
    what: str
    before: str
    now: str
    told: str

    @property
    def line(self) -> str:
        """The sentence, with the hashes where the difference is of content."""
        if not all(HASH.fullmatch(text) or not text for text in (self.before, self.now)):
            return self.told
        return f"{self.told} ({self.what}: {_shown(self.before)} then, {_shown(self.now)} now)"


class Change(BaseModel):
    """A difference that was accepted, as the state and the adapter keep it.

    Attributes:
        iteration: after which it was.
        what, before, now: as in :class:`Difference`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iteration: int
    what: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.what} after iteration {self.iteration}: {_shown(self.before)} -> {_shown(self.now)}"

    @classmethod
    def accepted(cls, difference: Difference, iteration: int) -> Change:
        """A difference that the run goes on with after an iteration."""
        return cls(iteration=iteration, what=difference.what, before=difference.before, now=difference.now)


def _shown(text: str) -> str:
    """A value as people are shown it: a hash's first digits, a path without its folder, which strangers may read."""
    path = Path(text.strip('"'))
    if path.is_absolute():
        return f'"{path.name}"'
    return text[:SHOWN] if HASH.fullmatch(text) else text or "none"


def other_setting(key: str, before: object, now: object, checkpoint: Path) -> Difference:
    """A setting of config.yaml that is another than in a checkpoint."""
    part, _, _ = key.partition(".")
    told = f"config.yaml: {key} is {now!r}, but {checkpoint} was trained with {before!r}"
    then, after = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return Difference(OTHERWISE.get(part, part), key, then, after, told)


def parts_named(accept: Iterable[str]) -> frozenset[str]:
    """The parts that ``--accept`` names, each value one or several with commas.

    Raises:
        UserError: one is none of :data:`ACCEPTABLE`.
    """
    names = [name.strip() for value in accept for name in value.split(",") if name.strip()]
    for name in names:
        if name not in ACCEPTABLE:
            raise UserError(f"--accept {name}: there is no such part of a run{did_you_mean(name, ACCEPTABLE)}")
    return frozenset(names)


def refuse_unaccepted(differences: Collection[Difference], accepted: Collection[str], run: Path) -> None:
    """Refuse to go on with differences that were not accepted.

    Args:
        run: its folder.

    Raises:
        UserError: names them all, and the very flag that accepts them.
    """
    refused = [difference for difference in differences if difference.part not in accepted]
    if not refused:
        return
    parts = [part for part in ACCEPTABLE if part in accepted or any(part == one.part for one in refused)]
    base = any(one.what.startswith(BASE) for one in refused)
    moved = f" (or say where the base is now: {resume_command(run)} --set model.path=...)" if base else ""
    told = "; ".join(one.line for one in refused)
    raise UserError(
        f"{told}; put it back{moved}, start a new run with `dgpo train`, or go on with it knowingly: "
        f"{resume_command(run)} --accept {','.join(parts)}"
    )


def refuse_misfit(
    saved: Mapping[str, Mapping[str, Tensor]], now: Mapping[str, Mapping[str, Tensor]], checkpoint: Path
) -> None:
    """Refuse to go on with a run whose tensors are not those of the checkpoint, whatever was accepted.

    Args:
        saved, now: tensors by copy and name, of the checkpoint and of the run as it would go on.

    Raises:
        UserError: names the first tensor that has no place.
    """
    before, after = _shapes(saved), _shapes(now)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            raise UserError(
                f"{checkpoint}: {name} has shape {before.get(name, 'none')} there and {after.get(name, 'none')} now, "
                f"so the adapter does not fit, accepted or not; start a new run with `dgpo train`"
            )


def _shapes(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {f"{copy}/{name}": tuple(t.shape) for copy, named in tensors.items() for name, t in named.items()}
