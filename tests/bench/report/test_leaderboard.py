"""Several comparisons on one page, and what is refused there by name. All data is synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo_bench.pictures import PICTURES_FILE, read_pictures, write_pictures
from dgpo_bench.records import BASE
from dgpo_bench.report.leaderboard import write_leaderboard
from dgpo_plugin.common.errors import UserError
from tests.bench.report.synthetic import METRICS, World, records, write_synthetic

pytestmark = pytest.mark.fast

WORLD = World({(name, s): c for name, c in (("ours", [0.4, 0.6, 0.7]), ("theirs", [0.4, 0.5, 0.5])) for s in (0, 1)})
OTHER = World({("third", 0): [0.4, 0.8, 0.9]})


def folders(tmp_path: Path, second: World = OTHER, **changes: Any) -> list[Path]:
    for name, world, its in (("first", WORLD, {}), ("second", second, changes)):
        (tmp_path / name).mkdir()
        write_synthetic(tmp_path / name, world, **its)
    return [tmp_path / "first", tmp_path / "second"]


def test_the_best_stands_first_with_what_its_number_depends_on(tmp_path: Path) -> None:
    path = write_leaderboard(folders(tmp_path), tmp_path / "board.html")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    table = text.partition("## Probability")[0].splitlines()
    methods = [line.split(" | ")[0].strip("| ") for line in table if line.startswith("| ")]
    assert methods == ["Method", "THIRD", "OURS", "THEIRS", "Base", "Base"]
    row = next(line for line in text.splitlines() if line.startswith("| THIRD"))
    for part in ("0.900", "+0.500", "better", "version 1", "accuracy 1", "euler, 10 steps, float32, 8 × 8", "second"):
        assert part in row
    assert "Leaderboard" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "changes", "message"),
    [
        ("task", {"version": 2}, "task version differs, 1 in first and 2 in second"),
        ("task", {"prompts_per_tag": 5}, "prompts per tag differs, 6 in first and 5 in second"),
        ("sampling", {"sampler": "heun"}, "sampler differs, euler in first and heun in second"),
        ("sampling", {"steps": 40}, "steps differs, 10 in first and 40 in second"),
        ("sampling", {"precision": "bf16"}, "precision differs, float32 in first and bf16 in second"),
        ("sampling", {"guidances": [1.0, 3.0]}, "choice of guidances differs, 1, 3, 4.5 in first and 1, 3 in second"),
        ("sampling", {"width": 16}, "size of pictures differs, 8 × 8 in first and 16 × 8 in second"),
    ],
)
def test_what_differs_is_named_and_refused(tmp_path: Path, field: str, changes: dict[str, Any], message: str) -> None:
    changed = getattr(records(OTHER), field).model_copy(update=changes)
    with pytest.raises(UserError, match=message) as raised:
        write_leaderboard(folders(tmp_path, **{field: changed}), tmp_path / "board.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "board.html").exists()
    assert not (tmp_path / "board.md").exists()


@pytest.mark.parametrize(("what", "changed"), [("version", "9"), ("weights", "ffff"), ("relation", "same data")])
def test_a_metric_that_was_computed_differently_is_refused(tmp_path: Path, what: str, changed: str) -> None:
    metrics = {**METRICS, "taste": METRICS["taste"].model_copy(update={what: changed})}
    with pytest.raises(UserError, match=f"{what} of taste .*differs|{what} of taste differs"):
        write_leaderboard(folders(tmp_path, metrics=metrics), tmp_path / "board.html")


def test_other_prompts_and_another_schema_are_refused(tmp_path: Path) -> None:
    more = World(OTHER.curves, tags={"one": 6, "two": 7})
    paths = folders(tmp_path, more)
    with pytest.raises(UserError, match="prompts of held-out differs, 14 of them in first and 13 of them in second"):
        write_leaderboard(paths, tmp_path / "board.html")
    record = paths[1] / "results.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"schema_version": 5', '"schema_version": 4'))
    with pytest.raises(UserError, match="schema version 4, this program reads 5"):
        write_leaderboard(paths, tmp_path / "board.html")
    with pytest.raises(UserError, match="each once"):
        write_leaderboard([paths[0], paths[0]], tmp_path / "board.html")
    with pytest.raises(UserError, match="one or more"):
        write_leaderboard([], tmp_path / "board.html")


def test_across_tasks_runs_are_compared_pair_by_pair(tmp_path: Path) -> None:
    """In the first task ours wins all pairs; in the second ours has .5 and .7, theirs .6 twice: half of the pairs."""
    task = records(WORLD).task.model_copy(update={"name": "another", "version": 7})
    curves = {("ours", 0): [0.4, 0.5], ("ours", 1): [0.4, 0.7], ("theirs", 0): [0.4, 0.6], ("theirs", 1): [0.4, 0.6]}
    path = write_leaderboard(folders(tmp_path, World(curves), task=task), tmp_path / "board.html")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    _, _, last = text.partition("## Probability of improvement")
    assert "averaged over 2 tasks" in last
    row = next(line for line in last.splitlines() if line.startswith("| OURS"))
    assert "0.75" in row
    assert "## made-up, version 1" in text
    assert "## another, version 7" in text


def test_guidances_chosen_on_other_validation_prompts_are_not_of_one_table(tmp_path: Path) -> None:
    sets = records(OTHER).sets
    fewer = sets["validation"].model_copy(update={"prompts": sets["validation"].prompts[:3]})
    with pytest.raises(UserError, match="prompts of validation differs, 14 of them in first and 3 of them in second"):
        write_leaderboard(folders(tmp_path, sets={**sets, "validation": fewer}), tmp_path / "board.html")


def test_a_base_whose_guidance_was_chosen_on_fewer_pictures_is_not_of_one_table(tmp_path: Path) -> None:
    paths = folders(tmp_path)
    pictures = read_pictures(paths[1] / PICTURES_FILE)
    fewer = (pictures.entry != BASE) | (pictures.set != "validation") | (pictures.image == 0)
    write_pictures(pictures.where(fewer), paths[1] / PICTURES_FILE)
    message = "number of pictures that the base's guidance was chosen on differs, 28 in first and 14 in second"
    with pytest.raises(UserError, match=message):
        write_leaderboard(paths, tmp_path / "board.html")


def test_runs_of_one_label_with_another_budget_are_not_one_methods(tmp_path: Path) -> None:
    budget = records(WORLD).budget.model_copy(update={"evaluations": 999})
    path = write_leaderboard(folders(tmp_path, WORLD, budget=budget), tmp_path / "board.html")
    last = path.with_suffix(".md").read_text(encoding="utf-8").partition("## Probability of improvement")[2]
    methods = [line.split(" | ")[0].strip("| ") for line in last.splitlines() if line.startswith("| ")]
    assert methods == ["A run of", "OURS (first)", "THEIRS (first)", "OURS (second)", "THEIRS (second)"]
