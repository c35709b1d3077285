"""Metrics of later: a reward looks at the pictures that a finished comparison or sweep kept, and gets its column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.folder_lock import only_process
from dgpo_plugin.common.user_file import is_from_file, told
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.yaml_text import read_yaml_text
from dgpo_plugin.rewards.registry import REWARDS

from .claim import plan_of
from .kept import check_kept, read_kept
from .measures import Measure, load_measures
from .meter import Meter
from .pictures import HASH, KEYS, PICTURES_FILE, Pictures, read_pictures, write_pictures
from .plan import Plan
from .prompt_sets import SampledSet, sampled_sets, swept_sets
from .records import KEPT_FOLDER, RESULTS_FILE, MetricRecord, Results, read_results, write_record
from .sweep_records import SWEEP_FILE, SweepRecord, read_sweep, sweep_plan_of
from .task import STATISTICS, Metric

BATCH = 64
"""Pictures that a metric is given at once, about: whole prompts."""


@dataclass(frozen=True)
class Measured:
    """A folder of results with the pictures that it kept.

    Attributes:
        sets: its prompts, with all that rewards read of them.
    """

    folder: Path
    plan: Plan
    results: Results | SweepRecord
    pictures: Pictures
    sets: Mapping[str, SampledSet]

    def with_column(self, name: str, record: MetricRecord, column: NDArray[np.float64]) -> Measured:
        """The same with another metric."""
        metrics = {**self.results.metrics, name: record}
        pictures = replace(self.pictures, metrics={**self.pictures.metrics, name: column})
        return replace(self, results=self.results.model_copy(update={"metrics": metrics}), pictures=pictures)

    def write(self) -> None:
        """Write both files; the records first: a metric without a column is drawn as nothing, a column without one
        could not be read."""
        file = SWEEP_FILE if isinstance(self.results, SweepRecord) else RESULTS_FILE
        write_record(self.results, self.folder / file)
        write_pictures(self.pictures, self.folder / PICTURES_FILE)


def add_metrics(folder: Path, asked: Sequence[str], meter: Meter) -> None:
    """Score the kept pictures of a folder with metrics that it does not have, one after the other.

    Args:
        asked: a registered reward, a reward of one's own (file.py:name), a metric of the task, or
            ``NAME={reward: ..., options: ...}`` as in a task's ``metrics``.

    Raises:
        UserError: the folder keeps no pictures; one is missing or changed; a metric is unknown, is there already, or
            can judge no prompt set. Nothing is changed by then, but for metrics that were named before it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that was made with --keep-pictures")
    with only_process(folder):
        measured = read_measured(folder)
        metrics = dict(_asked(measured.plan, text) for text in asked)
        if len(metrics) < len(asked):
            raise UserError("add-metric: names one twice")
        for name in metrics:
            _refuse_known(measured, name)
        check_kept(measured.pictures, folder / KEPT_FOLDER)
        for name, metric in metrics.items():
            measured = _added(measured, name, metric, meter)
            measured.write()


def read_measured(folder: Path) -> Measured:
    """What a folder holds that kept its pictures.

    Raises:
        UserError: it holds no results, or kept no pictures, or its prompts are others by now.
    """
    results: Results | SweepRecord
    if (folder / SWEEP_FILE).exists():
        swept, results = sweep_plan_of(folder), read_sweep(folder)
        plan = None if swept is None else swept.plan
        sets = {} if swept is None else swept_sets(swept.plan.task, swept.prompts)
    else:
        results, plan = read_results(folder / RESULTS_FILE), plan_of(folder)
        sets = {} if plan is None else sampled_sets(plan.task, plan.size)
    pictures = read_pictures(folder / PICTURES_FILE)
    if not len(pictures.kept()):
        raise UserError(f"{folder}: kept no pictures; make it again with --keep-pictures, in another folder")
    if plan is None:
        raise UserError(f"{folder}: has no plan.json, which says what was trained on; bring the whole folder back")
    for name, record in results.sets.items():
        if name not in sets or [each.text for each in record.prompts] != [each.text for each in sets[name].prompts]:
            raise UserError(f"{folder}: the prompts of {name} are others by now; bring their files back as they were")
    return Measured(folder, plan, results, pictures, sets)


def _asked(plan: Plan, text: str) -> tuple[str, Metric]:
    """What a metric on the command line is called, and what it stands for."""
    task = plan.task
    name, separator, settings = text.partition("={")
    if separator:
        values = read_yaml_text("{" + settings, f"add-metric {name}")
        try:
            metric = Metric.model_validate(values)
        except ValidationError as error:
            raise UserError(f"add-metric {name}: {explain(error, Metric, values)}") from error
    elif is_from_file(name):
        file, _, function = name.rpartition(":")
        metric, name = Metric(reward=name), f"{PurePath(file).name}:{function}"
    else:
        metric = task.metric(name)
    reward = metric.reward or name
    if not is_from_file(reward) and reward not in REWARDS and reward not in STATISTICS:
        near = did_you_mean(reward, [*task.metric_names(), *REWARDS])
        raise UserError(f"add-metric {name}: no metric or reward {reward!r}{near}; or name a file.py:name")
    if name in (*KEYS, HASH) or not name.strip() or not name.isprintable():
        raise UserError(
            f"add-metric {name!r}: cannot name a metric; call it otherwise, as in NAME={{reward: {reward}}}"
        )
    return name, metric.model_copy(update={"optional": False})


def _refuse_known(measured: Measured, name: str) -> None:
    """Refuse a metric that the results have; one that was missing, or lacks pictures that came later, is none."""
    record = measured.results.metrics.get(name)
    if record is None or record.missing:
        return
    if not record.added:
        raise UserError(f"add-metric {name}: is there already; a metric with other settings needs another name")
    column = measured.pictures.metrics.get(name)
    if column is not None and not _lacking(measured, name, _sets_of(measured, name)).any():
        raise UserError(f"add-metric {name}: is there already, added {record.added}")


def _sets_of(measured: Measured, name: str) -> list[str]:
    """The sets whose pictures a metric is for: those that the task names it for, or all that are reported."""
    reported = [each.name for each in measured.sets.values() if each.role != "validation"]
    asked = [each for each in reported if name in measured.sets[each].metrics]
    column = measured.pictures.metrics.get(name)
    if column is not None and measured.results.metrics[name].added:  # those that it could judge
        return [each for each in reported if np.isfinite(column[measured.pictures.set == each]).any()]
    return asked or reported


def _lacking(measured: Measured, name: str, sets: Sequence[str]) -> NDArray[np.bool_]:
    """Kept pictures of some sets, (R,), that have no value of a metric."""
    pictures = measured.pictures
    column = pictures.metrics.get(name, np.full(len(pictures), np.nan))
    lacking = np.isin(pictures.set, list(sets)) & ~np.isfinite(column)
    kept = np.zeros(len(pictures), dtype=np.bool_)
    kept[pictures.kept()] = True
    return lacking & kept


def _added(measured: Measured, name: str, metric: Metric, meter: Meter) -> Measured:
    """The folder with one more metric, scored."""
    task = measured.plan.task
    task = task.model_copy(update={"metrics": {**task.metrics, name: metric}})
    if name in STATISTICS:  # as the task would have had it
        task = task.model_copy(update={"metrics": measured.plan.task.metrics})
    scoring = measured.plan.base_config().scoring
    measure = load_measures(task, scoring, {}, names=[name])[name]
    record = measure.record.model_copy(update={"added": datetime.now(timezone.utc).strftime("%Y-%m-%d")})
    before = measured.results.metrics.get(name)
    if before is not None and before.added:
        if before.model_copy(update={"added": record.added}) != record:
            raise UserError(f"add-metric {name}: was added in another version or with other weights; call it otherwise")
        record = before
    sets = []
    for each in _sets_of(measured, name):
        prompts = measured.sets[each].prompts
        if problems := measure.check(prompts):
            said = f"{each}: {len(problems)} of {len(prompts)} prompts cannot be judged ({problems[0]})"
            meter.say(f"{name}: leaves out {said}")
        else:
            sets.append(each)
    if not sets:
        raise UserError(f"add-metric {name}: can judge none of the prompt sets whole; {said}")
    lacking = _lacking(measured, name, sets)
    column = measured.pictures.metrics.get(name, np.full(len(lacking), np.nan)).copy()
    _score(measured, measure, column, np.flatnonzero(lacking), meter)
    meter.say(
        f"{name}: {int(lacking.sum()):,} pictures, version {record.version}"
        f"{f', weights {record.weights}' if record.weights else ''}; {record.relation}"
        f"{': what was trained on' if record.relation == 'trained' else ''}"
    )
    return measured.with_column(name, record, column)


def _score(
    measured: Measured, measure: Measure, column: NDArray[np.float64], rows: NDArray[np.intp], meter: Meter
) -> None:
    """Fill in the rows of a column, some whole prompts of one place at a time, as they were drawn."""
    pictures = measured.pictures
    meter.start(len(rows))
    for batch in _batches(measured, rows):
        prompts = measured.sets[str(pictures.set[batch[0]])].prompts
        images = read_kept(pictures, batch, measured.folder / KEPT_FOLDER)
        try:
            column[batch] = measure.compute(images, [prompts[int(pictures.prompt[row])] for row in batch])
        except UserError:
            raise
        except Exception as error:  # whatever a user's reward raises
            raise UserError(f"add-metric {measure.name}: failed with {told(error)}") from error
        meter.advance(len(batch))


def _batches(measured: Measured, rows: NDArray[np.intp]) -> list[list[int]]:
    """Rows by where they were drawn, a prompt's pictures always together."""
    pictures = measured.pictures

    def place(row: int) -> tuple[object, ...]:
        name = str(pictures.set[row])
        more = bool(pictures.image[row] >= measured.sets[name].images)  # the base's, for the best of N
        return (*(getattr(pictures, key)[row] for key in KEYS[:5]), more)

    groups: dict[tuple[object, ...], dict[int, list[int]]] = {}
    for row in rows.tolist():
        groups.setdefault(place(row), {}).setdefault(int(pictures.prompt[row]), []).append(row)
    batches: list[list[int]] = []
    for group in groups.values():
        batches.append([])
        for _, members in sorted(group.items()):
            if batches[-1] and len(batches[-1]) + len(members) > BATCH:
                batches.append([])
            batches[-1] += sorted(members, key=lambda row: int(pictures.image[row]))
    return batches
