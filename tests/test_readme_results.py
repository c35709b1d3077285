"""The README's tables are those of the results that lie in bench/results, and these are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_bench.report.comparison import missing_cells, read_comparison
from dgpo_bench.report.leaderboard import write_leaderboard
from tools.readme_results import PAGE, RESULTS, page

pytestmark = pytest.mark.fast
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.json"))


def test_the_readme_has_the_tables_of_the_results() -> None:
    assert FOLDERS
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/readme_results.py --write"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_are_of_a_finished_comparison_of_a_commit(folder: Path) -> None:
    results = read_comparison(folder).results
    assert results.complete
    assert not missing_cells(results)
    assert results.git_hash
    assert {file.name for file in folder.iterdir()} == {"results.json", "pictures.csv.gz"}


def test_they_go_onto_one_page(tmp_path: Path) -> None:
    assert write_leaderboard(FOLDERS, tmp_path / "all.html").exists()
