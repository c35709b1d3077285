"""The file of results, damaged and foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgpo_bench.gpu.results import FILE, append_result, read_results
from dgpo_plugin.common.errors import UserError
from tests.bench.gpu.results_by_hand import result

pytestmark = pytest.mark.fast


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"not": "ours"}) + "\n" + "{}\n")
    with pytest.raises(UserError, match="line 1: not a measured row"):
        read_results(tmp_path)


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    append_result(tmp_path, result("a", "measured"))
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"row": "b", "ab')
    assert set(read_results(tmp_path)) == {"a"}
    append_result(tmp_path, result("c", "measured"))
    append_result(tmp_path, result("a", "failed"))
    assert {name: kept.status for name, kept in read_results(tmp_path).items()} == {"a": "failed", "c": "measured"}


def test_a_folder_that_went_is_one_line_and_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*gpu.jsonl: No such file or directory"):
        append_result(tmp_path / "gone", result("a", "measured"))
    assert not (tmp_path / "gone").exists()
