"""What a comparison's folder takes on: more of the same question, and nothing that changes what is measured already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgpo_bench.claim import CONTENTS_FILE, ENTRY_CONTENTS, claim_folder, claimed, plan_of
from dgpo_bench.plan import Plan
from dgpo_plugin.common.errors import UserError
from tests.bench.small_plans import two_seeds_of

pytestmark = pytest.mark.fast
MODEL = {"path": "shapes", "max_sequence_length": 1, "precision": "fp32"}


def begun() -> Plan:
    """DGPO and a control, two seeds."""
    return two_seeds_of(["dgpo"], 2, model=MODEL)


def with_preset(plan: Plan, **changes: Any) -> Plan:
    return plan.model_copy(update={"preset": plan.preset.model_copy(update=changes)})


def with_setting(plan: Plan, entry: str, section: str, **values: Any) -> Plan:
    algorithms = plan.preset.algorithms
    own = {**algorithms[entry], section: {**algorithms[entry].get(section, {}), **values}}
    return with_preset(plan, algorithms={**algorithms, entry: own})


def with_size(plan: Plan, **changes: Any) -> Plan:
    return plan.model_copy(update={"size": plan.size.model_copy(update=changes)})


GROWN: dict[str, Callable[[Plan], Plan]] = {
    "an algorithm, before those that are there": lambda plan: plan.model_copy(
        update={"entries": ["flow-grpo", *plan.entries]}
    ),
    "seeds": lambda plan: with_size(plan, seeds=4).model_copy(update={"seeds": [0, 1, 2, 3]}),
    "a control": lambda plan: with_size(plan, controls=("zero", "shuffled")).model_copy(
        update={"entries": [*plan.entries, "shuffled"]}
    ),
    "best-of-n": lambda plan: with_size(plan, controls=("zero", "best-of-n")).model_copy(update={"best_of_n": True}),
    "an algorithm with settings of today": lambda plan: with_setting(
        plan.model_copy(update={"entries": [*plan.entries, "flow-grpo"]}), "flow-grpo", "training", learning_rate=1e-5
    ),
    "other names, colors, notes and ranges": lambda plan: with_preset(
        plan, labels={}, colors={"dgpo": "#123456"}, notes={}, search={}, by_default=("dgpo",)
    ),
    "fewer runs at once": lambda plan: plan.spread(1, 1),
}


@pytest.mark.parametrize("name", GROWN)
def test_more_of_the_same_question_is_added(tmp_path: Path, name: str) -> None:
    claim_folder(begun(), tmp_path)
    more = GROWN[name](begun())
    assert more != begun()
    assert claim_folder(more, tmp_path) == more == plan_of(tmp_path)


OTHERS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "a setting of what was trained": (
        lambda plan: with_setting(plan, "dgpo", "algorithm", beta=11),
        "another preset",
    ),
    "a setting that a control takes from the challenger": (
        lambda plan: with_setting(plan, "dgpo", "training", learning_rate=1e-5),
        "another preset",
    ),
    "what all share": (
        lambda plan: with_preset(plan, shared={**plan.preset.shared, "lora": {"rank": 4, "alpha": 4}}),
        "another preset",
    ),
    "the base": (
        lambda plan: with_preset(plan, shared={**plan.preset.shared, "model": {**MODEL, "path": "words"}}),
        "another preset",
    ),
    "guidance of the curves": (lambda plan: with_preset(plan, guidance=2.0), "another preset"),
    "the budget": (lambda plan: with_size(plan, evaluations=1001), "another size"),
    "prompts": (lambda plan: with_size(plan, test_prompts=1), "another size"),
    "the task's version": (
        lambda plan: plan.model_copy(update={"task": plan.task.model_copy(update={"version": 9})}),
        "another task",
    ),
    "kept pictures": (lambda plan: plan.model_copy(update={"keep_pictures": True}), "another keep_pictures"),
    "a seed less": (lambda plan: plan.model_copy(update={"seeds": [0]}), "holds seed 1 too; name them as well"),
    "another control in its place": (
        lambda plan: plan.model_copy(update={"entries": ["dgpo", "shuffled"]}),
        "holds zero too; name them as well",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_question_is_refused_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    claim_folder(begun(), tmp_path)
    before = (tmp_path / "plan.json").read_bytes()
    change, message = OTHERS[name]
    with pytest.raises(UserError, match=message):
        claim_folder(change(begun()), tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == before


def test_best_of_n_that_was_asked_for_is_not_forgotten(tmp_path: Path) -> None:
    claim_folder(GROWN["best-of-n"](begun()), tmp_path)
    with pytest.raises(UserError, match="holds best-of-n too"):
        claim_folder(begun(), tmp_path)


def test_adapters_are_added_and_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    one = begun().model_copy(update={"entries": ["a"], "adapters": {"a": "a/adapter.safetensors"}, "seeds": [0]})
    two = one.model_copy(update={"entries": ["a", "b"], "adapters": {**one.adapters, "b": "b/adapter.safetensors"}})
    claim_folder(one, tmp_path)
    assert claim_folder(two, tmp_path) == two
    with pytest.raises(UserError, match="holds b too"):
        claim_folder(one, tmp_path)
    other = two.model_copy(update={"adapters": {**two.adapters, "a": "elsewhere/a/adapter.safetensors"}})
    with pytest.raises(UserError, match="its a was another file than elsewhere/a/adapter.safetensors;"):
        claim_folder(other, tmp_path)


def test_an_adapter_that_was_trained_anew_is_not_taken_for_the_one_that_was_measured(tmp_path: Path) -> None:
    plan = begun().model_copy(update={"entries": ["a"], "adapters": {"a": "a/adapter.safetensors"}, "seeds": [0]})
    old, new = (plan.model_copy(update={"adapter_sha256": {"a": each}}) for each in ("0123", "4567"))
    claim_folder(plan, tmp_path)
    assert claim_folder(old, tmp_path) == old == plan_of(tmp_path)
    with pytest.raises(UserError, match="its a was another file than a/adapter.safetensors;"):
        claim_folder(new, tmp_path)


class Refused(UserError):
    """What a job of a command is refused for."""


def refused_within(plan: Plan, folder: Path, *written: str) -> None:
    """A command that writes some files and is refused then."""
    with contextlib.suppress(Refused), claimed(plan, folder):
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        raise Refused("no")


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_command_that_was_refused_before_it_measured_leaves_nothing(tmp_path: Path) -> None:
    refused_within(begun(), tmp_path, CONTENTS_FILE, "missing.json", ENTRY_CONTENTS.format("dgpo"))
    assert files(tmp_path) == set()
    other = with_size(begun(), evaluations=2000)
    with claimed(other, tmp_path):
        pass
    assert plan_of(tmp_path) == other


def test_what_could_not_be_added_is_not_asked_for_afterwards(tmp_path: Path) -> None:
    with claimed(begun(), tmp_path):
        for name in (CONTENTS_FILE, "base.json", "runs/dgpo-seed0/cell.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
    before = files(tmp_path)
    grown = GROWN["an algorithm, before those that are there"](begun())
    refused_within(grown, tmp_path, ENTRY_CONTENTS.format("flow-grpo"))
    assert files(tmp_path) == before
    assert plan_of(tmp_path) == begun()


@pytest.mark.parametrize("name", ["base.json", "runs/dgpo-seed1/cell.json", "runs/dgpo-seed1/progress.json"])
def test_what_was_measured_keeps_its_plan(tmp_path: Path, name: str) -> None:
    refused_within(begun(), tmp_path, CONTENTS_FILE, name)
    assert files(tmp_path) == {"plan.json", CONTENTS_FILE, name}
