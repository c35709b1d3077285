"""The files of a comparison, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path

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
