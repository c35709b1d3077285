"""A sweep as its page reads it: what each setting scored, and differences by prompt and noise."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.errors import UserError

from ..pictures import PICTURES_FILE, Pictures, read_pictures
from ..sweep_records import SWEEP_FILE, Axis, Setting, SweepRecord, read_sweep
from .comparison import Role
from .intervals import Array, Estimate, estimate, headline_prompts
from .measures import prompt_means

AXES: dict[Axis, str] = {"strength": "Strength", "steps": "Steps", "guidance": "Guidance"}


@dataclass(frozen=True, eq=False)
class SweepView:
    """Records and pictures that belong together.

    Attributes:
        groups: rows of the pictures' table by setting and prompt set.
    """

    record: SweepRecord
    pictures: Pictures
    groups: dict[tuple[Setting, str], NDArray[np.intp]]

    @property
    def sign(self) -> float:
        """1 where more of the headline is better, -1 where less is."""
        return -1.0 if self.record.metrics[self.record.task.headline].better == "lower" else 1.0

    @property
    def rival(self) -> Setting:
        """The untrained base at its best guidance."""
        return self.record.center.base().at("guidance", self.record.base_guidance)

    def on_axis(self, axis: Axis) -> list[Setting]:
        """The adapter's settings of an axis that were measured, rising."""
        tried = [self.record.center.at(axis, value) for value in self.record.axes[axis]]
        return [each for each in tried if each in self.record.settings]

    def sets_of(self, role: Role) -> list[str]:
        """The names of the prompt sets with a role, in order."""
        return [name for name, prompts in self.record.sets.items() if prompts.role == role]

    def scores(self, setting: Setting, set_name: str, metric: str) -> Array:
        """What a setting's pictures of a set scored, (P, I), NaN where it was not measured."""
        prompts = self.record.sets[set_name]
        found = np.full((len(prompts.prompts), prompts.images_per_prompt), np.nan)
        rows = self.groups.get((setting, set_name))
        if rows is not None and metric in self.pictures.metrics:
            found[self.pictures.prompt[rows], self.pictures.image[rows]] = self.pictures.metrics[metric][rows]
        return found

    @functools.cached_property
    def _estimates(self) -> dict[tuple[Setting, Setting | None, Role, str], Estimate | None]:
        return {}

    def value(self, setting: Setting, role: Role, metric: str) -> Estimate | None:
        """The mean of a setting; None where nothing was measured."""
        return self._estimate(setting, None, role, metric)

    def difference(self, setting: Setting, other: Setting, role: Role, metric: str) -> Estimate | None:
        """One setting less another, picture by picture; None where they share none."""
        return self._estimate(setting, other, role, metric)

    def gain(self, setting: Setting, other: Setting, role: Role) -> Estimate | None:
        """The difference in the headline, positive where the first is better."""
        found = self.difference(setting, other, role, self.record.task.headline)
        return found.reversed() if found is not None and self.sign < 0 else found

    def _estimate(self, setting: Setting, other: Setting | None, role: Role, metric: str) -> Estimate | None:
        key = setting, other, role, metric
        if key not in self._estimates:
            self._estimates[key] = self._made(setting, other, role, metric)
        return self._estimates[key]

    def _made(self, setting: Setting, other: Setting | None, role: Role, metric: str) -> Estimate | None:
        values, tags = list[Array](), list[str]()
        for name in self.sets_of(role):
            scores = self.scores(setting, name, metric)
            if other is not None:
                scores = scores - self.scores(other, name, metric)
            means, counted = prompt_means(scores), self._counted(name)
            kept = np.isfinite(means) & counted
            values.append(means[kept])
            prompts = self.record.sets[name].prompts
            tags += [f"{name} {prompt.tag}" for prompt, one in zip(prompts, kept, strict=True) if one]
        return estimate(np.concatenate(values)[None], tags) if tags else None

    def _counted(self, set_name: str) -> NDArray[np.bool_]:
        """Which prompts of a set count, (P,): those of kinds with enough of them, or all where none has."""
        tags = [prompt.tag for prompt in self.record.sets[set_name].prompts]
        chosen = headline_prompts(tags, self.record.task.prompts_per_tag)
        return chosen if chosen.any() else np.ones(len(tags), dtype=np.bool_)


def read_sweep_view(folder: Path) -> SweepView:
    """What ``sweep.json`` and ``pictures.csv.gz`` of a folder hold, checked against each other.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    record, path = read_sweep(folder), folder / PICTURES_FILE
    return view_of(record, read_pictures(path), path)


def view_of(record: SweepRecord, pictures: Pictures, path: Path) -> SweepView:
    """Records and pictures as one, after what neither file alone can tell was checked.

    Args:
        path: of the pictures, for messages.

    Raises:
        UserError: a row is of no setting, set or prompt of the sweep, or carries an unknown metric; a setting that the
            page stands on is missing.
    """
    wrong = f"pictures {path}: %s; run the sweep again"
    if unknown := [name for name in pictures.metrics if name not in record.metrics]:
        raise UserError(wrong % f"metric {unknown[0]!r} is none of {SWEEP_FILE}'s")
    settings = {(each.entry, each.guidance): each for each in record.settings}
    for needed in (record.center, record.center.base(), record.center.base().at("guidance", record.base_guidance)):
        if needed not in record.settings:
            raise UserError(f"{path.with_name(SWEEP_FILE)}: lacks {needed.entry}; the same sweep goes on with it")
    rows: dict[tuple[Setting, str], list[int]] = {}
    for row, key in enumerate(zip(pictures.entry.tolist(), pictures.guidance.tolist(), strict=True)):
        name = str(pictures.set[row])
        if key not in settings or name not in record.sets:
            raise UserError(wrong % f"{key[0]}, guidance {key[1]:g}, set {name} is none of {SWEEP_FILE}'s")
        rows.setdefault((settings[key], name), []).append(row)
    for (_, name), members in rows.items():
        prompts, numbers = record.sets[name], np.array(members)
        places = pictures.prompt[numbers] * prompts.images_per_prompt + pictures.image[numbers]
        inside = (pictures.prompt[numbers] >= 0) & (pictures.prompt[numbers] < len(prompts.prompts))
        inside &= (pictures.image[numbers] >= 0) & (pictures.image[numbers] < prompts.images_per_prompt)
        if not inside.all() or len(set(places.tolist())) < len(places):
            raise UserError(wrong % f"a picture of {name} that {SWEEP_FILE} does not have, or one twice")
    return SweepView(record, pictures, {key: np.array(members) for key, members in rows.items()})


def best_of(view: SweepView, settings: Sequence[Setting]) -> Setting:
    """The setting with the best headline in domain; of equal ones where the axes cross, or the first."""

    def of(setting: Setting) -> tuple[float, bool]:
        found = view.value(setting, "in_domain", view.record.task.headline)
        return -np.inf if found is None else view.sign * found.mean, setting == view.record.center

    return max(settings, key=of)
