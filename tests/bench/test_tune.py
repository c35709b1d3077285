"""Settings searched for alike: drawn and written before the first trial, gone on with where it was stopped."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dgpo_bench import tune as tuning_module
from dgpo_bench.commands import main
from dgpo_bench.gather import TUNING_FILE, read_tuning
from dgpo_bench.plan import Plan
from dgpo_bench.preset import Range, load_preset
from dgpo_bench.records import Trial
from dgpo_bench.task import Metric
from dgpo_bench.tune import drawn, nested, tune
from dgpo_plugin.common.errors import UserError
from tests.bench.test_workers import Ear

pytestmark = pytest.mark.fast


def plan(**changes: Any) -> Plan:
    preset, task = load_preset("shapes")
    preset = preset.model_copy(update=changes)
    return Plan.of("shapes", preset, task, "quick", preset.sized("quick", 1), ["dgpo", "flow-grpo"], jobs=1)


def test_a_trial_is_drawn_from_its_ranges_and_stays_what_it_is() -> None:
    ranges = {"a.b": Range(low=1e-4, high=1e-2, log=True), "c": Range(choices=(1, 2, 3)), "d": Range(low=-1, high=1)}
    trials = [drawn(ranges, "dgpo", number) for number in range(300)]
    assert trials[7] == drawn(ranges, "dgpo", 7)
    assert trials[7]["c"] == drawn({"c": ranges["c"]}, "dgpo", 7)["c"]
    assert trials[:5] != [drawn(ranges, "other", number) for number in range(5)]
    assert {trial["c"] for trial in trials} == {1, 2, 3}
    assert all(1e-4 <= trial["a.b"] <= 1e-2 and -1 <= trial["d"] <= 1 for trial in trials)
    # Half of a logarithmic range is below its geometric mean.
    assert sum(trial["a.b"] < math.sqrt(1e-4 * 1e-2) for trial in trials) == pytest.approx(150, abs=40)


def test_dotted_settings_are_sections() -> None:
    assert nested({"training.learning_rate": 1, "training.seed": 2, "x": 3}) == {
        "training": {"learning_rate": 1, "seed": 2},
        "x": 3,
    }


def test_all_is_written_before_the_first_trial_and_kept_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    asked: list[tuple[str, int]] = []

    def run_jobs(_workers: Any, jobs: Any, _listener: Any, after_each: Any, failed: Any, died: Any) -> None:
        for job in jobs:
            before = read_tuning(tmp_path / TUNING_FILE)
            assert len(before.trials) == 6
            assert all(trial.settings for trial in before.trials)
            asked.append((job.entry, job.seed))
            if len(asked) == 4:
                raise Stopped
            if job.entry == "flow-grpo" and job.seed == 0:
                failed(job, "out of memory")
            elif len(asked) == 6:
                died(job, "its process was ended by SIGKILL")
            else:
                after_each(job, (0.1 * job.seed + 0.5, 1000))

    class Workers:
        def __enter__(self) -> Any:
            return []

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(tuning_module, "run_jobs", run_jobs)
    monkeypatch.setattr(tuning_module, "start_workers", lambda *_: Workers())
    with pytest.raises(Stopped):
        tune(plan(), tmp_path, 3, Ear())
    ear = Ear()
    assert len(tune(plan(), tmp_path, 3, ear).done()) == 5
    assert [event.text for event in ear.heard if "SIGKILL" in event.text] == ["its process was ended by SIGKILL"]
    tuning = tune(plan(), tmp_path, 3, Ear())
    assert asked == [
        ("dgpo", 0),
        ("flow-grpo", 0),
        ("dgpo", 1),
        ("flow-grpo", 1),  # here it was stopped
        ("flow-grpo", 1),
        ("dgpo", 2),  # whose process died: nothing is wrong with it
        ("flow-grpo", 2),
        ("dgpo", 2),
    ]
    values = {(trial.entry, trial.number): trial.value for trial in tuning.done()}
    assert values == {
        ("dgpo", 0): 0.5,
        ("flow-grpo", 0): None,
        ("dgpo", 1): 0.6,
        ("flow-grpo", 1): 0.6,
        ("dgpo", 2): 0.7,
        ("flow-grpo", 2): 0.7,
    }
    assert tuning.ranges["dgpo"]["training.learning_rate"] == tuning.ranges["flow-grpo"]["training.learning_rate"]
    assert tune(plan(), tmp_path, 3, Ear()) == tuning
    with pytest.raises(UserError, match="holds another search or a larger one"):
        tune(plan(), tmp_path, 2, Ear())
    assert read_tuning(tmp_path / TUNING_FILE) == tuning


def test_further_trials_and_entries_are_added_to_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []

    def run_jobs(_workers: Any, jobs: Any, _listener: Any, after_each: Any, *_: Any) -> None:
        for job in jobs:
            done.append((job.entry, job.seed))
            after_each(job, (0.1 * job.seed, 1000))

    monkeypatch.setattr(tuning_module, "run_jobs", run_jobs)
    monkeypatch.setattr(tuning_module, "start_workers", lambda *_: contextlib.nullcontext([]))
    whole = plan()
    alone = whole.model_copy(update={"entries": ["flow-grpo"]})
    first = tune(alone, tmp_path, 1, Ear())
    more = tune(alone, tmp_path, 2, Ear())
    assert done == [("flow-grpo", 0), ("flow-grpo", 1)]
    assert more.trials[0] == first.trials[0]
    all_of_it = tune(whole, tmp_path, 2, Ear())
    assert done[2:] == [("dgpo", 0), ("dgpo", 1)]
    assert [(trial.entry, trial.number) for trial in all_of_it.trials] == [
        ("dgpo", 0),
        ("flow-grpo", 0),
        ("dgpo", 1),
        ("flow-grpo", 1),
    ]
    assert all(trial.value == 0.1 * trial.number for trial in all_of_it.trials)
    assert len(all_of_it.done()) == 4
    ranges = {"shared": {"training.learning_rate": Range(low=1e-5, high=1e-3, log=True)}}
    other = whole.model_copy(update={"preset": whole.preset.model_copy(update={"search": ranges})})
    for changed in (alone, other, whole.model_copy(update={"task": whole.task.model_copy(update={"version": 9})})):
        with pytest.raises(UserError, match="holds another search or a larger one"):
            tune(changed, tmp_path, 2, Ear())


def test_trials_of_one_algorithm_run_at_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Plan] = []

    def found(plan: Plan, *_: Any) -> Any:
        asked.append(plan)
        raise UserError("enough")

    monkeypatch.setattr(tuning_module, "tune", found)
    for jobs, trials in ((3, 16), (3, 2)):
        arguments = ["tune", "shapes", "--algorithms", "dgpo", "--trials", str(trials), "--jobs", str(jobs)]
        assert CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)]).exit_code == 2
    assert [plan.jobs for plan in asked] == [3, 2]


def test_a_preset_without_ranges_and_ranges_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no ranges to draw from"):
        tune(plan(search={}), tmp_path, 1, Ear())
    with pytest.raises(UserError, match="learning_rate"):
        tune(plan(search={"shared": {"training.learning_rate": Range(choices=(-1.0,))}}), tmp_path, 1, Ear())
    assert not (tmp_path / TUNING_FILE).exists()


def test_a_trial_sees_validation_prompts_and_a_seed_from_100_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, task = load_preset("shapes")
    few = {"evaluations": 400, "flops": None, "validation_prompts": 1, "images_per_prompt": 1, "guidances": (1.0,)}
    values = {**preset.shared, "rollout": {"steps": 4}}
    values["training"] = {**values["training"], "prompts_per_iteration": 2, "group_size": 2}
    size = preset.sizes["quick"].model_copy(update=few)
    ranges = {"shared": {"algorithm.noisiest_steps": Range(choices=(3,)), "algorithm.timesteps": Range(choices=(2,))}}
    preset = preset.model_copy(update={"shared": values, "search": ranges, "guidance": 1.0})
    small = Plan.of("shapes", preset, task, "quick", size, ["dgpo"], jobs=1)
    monkeypatch.setattr(tuning_module, "run_jobs", lambda *_: None)
    monkeypatch.setattr(tuning_module, "start_workers", lambda *_: contextlib.nullcontext([]))
    tune(small, tmp_path, 1, Ear())
    built: list[Any] = []
    real = tuning_module.build_trainer

    def noted(config: Any) -> Any:
        built.append(config)
        return real(config)

    monkeypatch.setattr(tuning_module, "build_trainer", noted)
    value, cost = tuning_module.run_trial(small, tmp_path, "dgpo", 0, Ear())
    assert 0 <= value <= 1
    assert 0 < cost <= 400
    assert built[0].training.seed >= 100
    assert built[0].algorithm.model_dump()["noisiest_steps"] == 3


def test_the_best_trials_are_said_first_where_less_is_better_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (loaded, task), values = load_preset("shapes"), [0.9, 0.1, 0.5]
    metric = Metric(reward="shapes", better="lower")
    task = task.model_copy(update={"metrics": {**task.metrics, "accuracy": metric}})
    monkeypatch.setattr("dgpo_bench.asked.load_preset", lambda _: (loaded, task))
    found = tune(plan(), tmp_path, 0, Ear())
    trials = [
        Trial(entry="dgpo", number=i, settings={}, value=value, denoiser_evaluations=1)
        for i, value in enumerate(values)
    ]
    found = found.model_copy(update={"trials": trials, "finished": ["dgpo:0", "dgpo:1", "dgpo:2"]})
    monkeypatch.setattr(tuning_module, "tune", lambda *_: found)
    result = CliRunner().invoke(main, ["tune", "shapes", "--algorithms", "dgpo", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.output.splitlines() if line.startswith("dgpo:")] == [
        "0.100",
        "0.500",
        "0.900",
    ]
