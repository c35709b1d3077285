"""Trackers go on with their curve. Their packages are not installed here: imitated, by accelerate's own interface."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking as tracking
import pytest
from accelerate import Accelerator
from rich.console import Console

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training import run
from dgpo_plugin.training.run_folder import last_logged
from dgpo_plugin.training.trackers import NAMED_BY_THEM, NAMED_BY_US, PROJECT, start_trackers
from dgpo_plugin.training.trainer import Trainer
from tests.conftest import SMALL

pytestmark = pytest.mark.fast


class Service:
    """What a tracking service has: runs by their names, each with the steps that it was told of, in order."""

    def __init__(self) -> None:
        self.runs: dict[str, list[int]] = {}
        self.started: list[dict[str, Any]] = []
        self.configs: list[str] = []

    def open(self, name: str, keywords: dict[str, Any]) -> SimpleNamespace:
        self.started.append(keywords)
        steps = self.runs.setdefault(name, [])
        log = lambda values, step=None, **more: steps.append(step)  # noqa: E731
        update = lambda values, **more: self.configs.append(name)  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: None, config=SimpleNamespace(update=update))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Service:
    """wandb as far as accelerate's tracker uses it."""
    service, module = Service(), ModuleType("wandb")

    def init(project: str, id: str = "", resume: str = "never", **more: Any) -> SimpleNamespace:
        assert project == PROJECT
        assert resume == "allow" or id not in service.runs, "such a run exists"
        opened = service.open(id, {"id": id, "resume": resume, **more})
        vars(module)["config"] = opened.config
        return opened

    vars(module)["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    return service


class Noting(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker of the interface alone, registered by a test under the name that it stands for."""

    requires_logging_directory = False
    started: ClassVar[list[dict[str, Any]]] = []
    steps: ClassVar[list[int]] = []
    configs: ClassVar[list[Any]] = []
    run: Any = SimpleNamespace(info=SimpleNamespace(run_id="m-1"), hash="a-1", id="c-1")

    def __init__(self, run_name: str, **keywords: Any) -> None:
        super().__init__()
        self.started.append(keywords)

    @property
    def tracker(self) -> Any:
        return self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configs.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **keywords: Any) -> None:
        assert step is not None
        self.steps.append(step)


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> type[Noting]:
    for name in ("started", "steps", "configs"):
        monkeypatch.setattr(Noting, name, [])
    return Noting


def register(kind: type[Noting], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "name", name, raising=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    known = [tracking.LoggerType(name)] if name in tracking.LoggerType else []
    monkeypatch.setattr(tracking, "_available_trackers", known)


class Kill(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def killed_after(iteration: int) -> run.Watch:
    def watch(trainer: Trainer, record: Mapping[str, float] | None) -> None:
        if trainer.iteration == iteration:
            raise Kill

    return watch


def test_a_run_of_wandbs_goes_on_with_its_curve(wandb: Service, tmp_path: Path) -> None:
    """Killed after iteration 3 with a checkpoint after 2, so that 3 is done twice; 4 in all."""
    folder, quiet = tmp_path / "run", Console(quiet=True)
    own = ["training.iterations=4", "training.decay=none", "checkpoint.every=2", "logging.sample_every=0"]
    config = load_config("shapes", [*SMALL, *own, "logging.trackers=[wandb]"])
    with pytest.raises(Kill):
        run.train(config, folder, quiet, watch=killed_after(3))
    assert last_logged(folder / "metrics.jsonl") == 3
    run.resume(folder, quiet)
    ((name, steps),) = wandb.runs.items()
    assert steps == [1, 2, 3, 4], "no iteration twice, none left out, in one run"
    assert len(name) == 32
    assert wandb.started == [{"id": name, "resume": "allow"}] * 2
    assert wandb.configs == [name]
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": name}


def test_two_runs_are_two(wandb: Service, tmp_path: Path) -> None:
    for name in ("one", "two"):
        start_trackers(Accelerator(cpu=True), ["wandb"], tmp_path / name, 0, 0, "").log({}, 1)
    assert list(wandb.runs.values()) == [[1], [1]]


def killed_and_resumed(folder: Path, name: str) -> None:
    """What those runs tell a tracker, without the runs."""
    for done, logged, last in ((0, 0, 3), (2, 3, 4), (4, 4, 5)):
        trackers = start_trackers(Accelerator(cpu=True), [name], folder, done, logged, "seed: 0")
        for iteration in range(done + 1, last + 1):
            trackers.log({"reward": 0.5}, iteration)


GIVEN_BACK: dict[str, dict[str, Any]] = {
    "trackio": {"resume": "allow"},
    "swanlab": {"resume": "allow"},
    "comet_ml": {},
    "mlflow": {"run_id": "m-1"},
    "aim": {"run_hash": "a-1"},
    "clearml": {"reuse_last_task_id": "c-1", "continue_last_task": 0},
}


@pytest.mark.parametrize("name", GIVEN_BACK)
def test_what_each_calls_the_run_is_given_back_to_it(
    name: str, noting: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(noting, name, monkeypatch)
    killed_and_resumed(tmp_path, name)
    assert noting.steps == [1, 2, 3, 4, 5]
    first, *later = noting.started
    assert first == ({} if name in NAMED_BY_THEM else later[0]), "one that names runs itself starts as ever"
    assert later[0] == later[1]
    assert later[0].items() >= GIVEN_BACK[name].items()
    assert noting.configs == [{"config": "seed: 0"}]


@pytest.mark.parametrize(
    ("name", "key", "lengths"), [("swanlab", "id", {21}), ("comet_ml", "experiment_key", set(range(32, 51)))]
)
def test_our_names_are_of_the_length_that_is_asked_for(name: str, key: str, lengths: set[int]) -> None:
    keywords = NAMED_BY_US[name]("0123456789abcdef" * 2)
    assert len(keywords[key]) in lengths
    assert keywords[key].isalnum()


def test_tensorboard_takes_back_what_is_done_again(
    noting: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SummaryWriter's own means: from ``purge_step`` on, what was shown is dropped, and told anew."""
    register(noting, "tensorboard", monkeypatch)
    killed_and_resumed(tmp_path, "tensorboard")
    assert noting.started == [{}, {"purge_step": 3}, {"purge_step": 5}]
    assert noting.steps == [1, 2, 3, 3, 4, 5]
    assert len(noting.configs) == 1, "each would be a run of its own"


def test_dvclive_goes_on_in_the_runs_own_folder(
    noting: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(noting, "dvclive", monkeypatch)
    killed_and_resumed(tmp_path, "dvclive")
    assert noting.started == [{"dir": str(tmp_path / "dvclive"), "resume": resume} for resume in (False, True, True)]
    assert noting.steps == [1, 2, 3, 4, 5]


def test_a_tracker_of_ones_own_is_not_told_twice(
    noting: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(noting, "mine", monkeypatch)
    try:
        tracking.filter_trackers(["mine"], str(tmp_path))
    except ValueError:
        pytest.skip("this accelerate knows its own trackers alone")
    killed_and_resumed(tmp_path, "mine")
    assert noting.started == [{}, {}, {}]
    assert noting.steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kept", [None, "damaged", "[1]", '{"wandb": "other"}'])
def test_a_tracker_that_has_nothing_of_the_run_is_told_from_there_on(
    kept: str | None, noting: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was added later, or whose name of the run is lost: a curve that begins later is better than no run."""
    register(noting, "mlflow", monkeypatch)
    if kept is not None:
        (tmp_path / "trackers.json").write_text(kept)
    trackers = start_trackers(Accelerator(cpu=True), ["mlflow"], tmp_path, 2, 3, "seed: 0")
    for iteration in (3, 4):
        trackers.log({}, iteration)
    assert (noting.started, noting.steps) == ([{}], [3, 4])
    names = json.loads((tmp_path / "trackers.json").read_text())
    assert names["mlflow"] == "m-1"
    assert ("wandb" in names) == (kept == '{"wandb": "other"}'), "another tracker's is kept"


@pytest.mark.parametrize("name", ["wandb", "tensorbord"])
def test_a_tracker_that_is_not_there_is_told_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    config = load_config("shapes", [*SMALL, f"logging.trackers=[{name}]"])
    with pytest.raises(UserError, match=f"logging.trackers: .*{name}.*; install the tracker or leave it out"):
        run.train(config, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run" / "config.yaml").exists()
