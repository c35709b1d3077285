"""The files of a comparison, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_bench.results import Results, read_base, read_results, read_run
from dgpo_plugin.common.errors import UserError
from tests.bench.conftest import MakeResults


@pytest.mark.fast
def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        read_results(tmp_path / "results.json")
    assert Results.model_fields["schema_version"].default == 3


@pytest.mark.fast
def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not a finished run; remove it"):
        read_run(tmp_path / "run.json")
    with pytest.raises(UserError, match=r"base\.json: cannot be read; remove it"):
        read_base(tmp_path / "base.json")


@pytest.mark.fast
def test_an_algorithm_without_a_label_is_called_as_it_is(make_results: MakeResults) -> None:
    results = make_results({("mine", 0): [0.1]}, labels={"other": "Another"})
    assert (results.label("mine"), results.label("other")) == ("mine", "Another")


def damage(record: dict[str, Any], how: str) -> None:
    first, *_ = record["runs"]
    if how == "NaN metric":
        first["evaluations"][0]["metrics"]["score"] = float("nan")
    elif how == "infinite seconds":
        first["evaluations"][0]["seconds"] = float("inf")
    elif how == "twice":
        record["runs"].append(first)
    elif how == "unknown algorithm":
        first["algorithm"] = "elsewhere"
    elif how == "unknown seed":
        first["seed"] = 9
    elif how == "wrong type":
        record["runs"] = "none"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("NaN metric", r"runs\.0\.evaluations\.0\.metrics\.score: .*finite number"),
        ("infinite seconds", r"runs\.0\.evaluations\.0\.seconds: .*finite number"),
        ("twice", "run dgpo, seed 0: stands there twice"),
        ("unknown algorithm", "run elsewhere, seed 0: the comparison has no such algorithm or seed"),
        ("unknown seed", "run dgpo, seed 9: the comparison has no such"),
        ("wrong type", "runs: must be a list"),
    ],
)
def test_results_that_mean_nothing_are_refused_in_one_line(
    how: str, message: str, make_results: MakeResults, tmp_path: Path
) -> None:
    record = make_results({("dgpo", 0): [0.1, 0.2], ("flow-grpo", 0): [0.1, 0.3]}).model_dump()
    damage(record, how)
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message) as refused:
        read_results(tmp_path / "results.json")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.fast
def test_results_nested_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        read_results(tmp_path / "results.json")
