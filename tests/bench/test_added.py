"""A metric of later: the pictures that an evaluation kept, scored with what it did not have."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dgpo_bench.adapters import evaluate_adapters
from dgpo_bench.claim import plan_of
from dgpo_bench.commands import main
from dgpo_bench.expense import keeping
from dgpo_bench.gather import gather
from dgpo_bench.kept import kept_name, read_kept
from dgpo_bench.pictures import PICTURES_FILE, read_pictures, write_pictures
from dgpo_bench.plan import Plan, base_file
from dgpo_bench.preset import load_preset
from dgpo_bench.records import KEPT_FOLDER, read_results
from tests.bench.test_compare import small_preset
from tests.bench.test_finished_adapters import exported

pytestmark = pytest.mark.fast
PICKY = """
from dgpo_plugin.rewards import Reward

class Picky(Reward):
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def check(self, prompts):
        return ["asks for nothing that can be seen" for prompt in prompts]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and its base, evaluated with all pictures kept; tests change copies."""
    folder = tmp_path_factory.mktemp("kept")
    preset, task = load_preset(small_preset(folder))
    size = preset.sized("quick", seeds=1, controls="none")
    plan = Plan.of("small", preset, task, "quick", size, [], jobs=1)
    adapter = exported(folder / "mine", 0.3)
    entries = {"entries": ["mine"], "adapters": {"mine": str(adapter)}, "keep_pictures": True}
    evaluate_adapters(plan.model_copy(update=entries), folder / "out")
    return folder / "out"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def own(folder: Path, body: str = "return images[:, 0].mean((1, 2))") -> str:
    """A reward of one's own beside the folder."""
    (folder.parent / "mine.py").write_text(f"def red(images, prompts):\n    {body}\n")
    return f"{folder.parent / 'mine.py'}:red"


def add(folder: Path, *metrics: str) -> Result:
    return CliRunner().invoke(main, ["add-metric", str(folder), *metrics])


def test_every_measured_picture_is_kept_and_counted(made: Path) -> None:
    results, pictures = read_results(made / "results.json"), read_pictures(made / PICTURES_FILE)
    assert len(pictures.kept()) == len(pictures) == len(list((made / KEPT_FOLDER).rglob("*.webp")))
    assert results.kept is not None
    assert results.kept.pictures == len(pictures)
    assert results.command.endswith("--keep-pictures")
    assert {"base", "mine"} == set(pictures.entry.tolist())
    plan = plan_of(made)
    assert plan is not None
    said = re.fullmatch(r"keeps (\d+) pictures of 64 x 64 at most, ([\d.]+) MB at most", keeping(plan))
    assert said is not None
    assert len(pictures) <= int(said[1]) <= 1.5 * len(pictures)
    assert results.kept.megabytes <= float(said[2])
    # 8 bits a channel are what was measured, but for their rounding.
    seen = read_kept(pictures, list(range(8)), made / KEPT_FOLDER).mean((1, 2, 3))
    measured = pictures.metrics["brightness"][:8]
    where = np.isfinite(measured)
    np.testing.assert_allclose(seen.numpy()[where], measured[where], atol=1 / 255)


def test_a_metric_of_ones_own_gets_its_column_and_is_marked_as_added_later(copied: Path) -> None:
    before = read_pictures(copied / PICTURES_FILE)
    result = add(copied, own(copied), "twice={reward: shapes, at_least: 0.5, label: Half right}")
    assert result.exit_code == 0, (result.output, result.exception)
    results, after = read_results(copied / "results.json"), read_pictures(copied / PICTURES_FILE)
    assert list(results.metrics)[-2:] == list(after.metrics)[-2:] == ["mine.py:red", "twice"]
    record = results.metrics["mine.py:red"]
    assert (record.relation, bool(record.added), len(record.version)) == ("untrained", True, 12)
    assert results.metrics["twice"].relation == "trained"
    assert "what was trained on" in result.stdout
    reported = np.flatnonzero(after.set != "validation")
    expected = read_kept(after, reported.tolist(), copied / KEPT_FOLDER)[:, 0].mean((1, 2))
    np.testing.assert_allclose(after.metrics["mine.py:red"][reported], expected, rtol=1e-6)
    assert np.isnan(after.metrics["mine.py:red"][after.set == "validation"]).all()
    assert set(after.metrics["twice"][reported].tolist()) <= {0.0, 1.0}
    for name, column in before.metrics.items():
        np.testing.assert_array_equal(after.metrics[name], column)
    page = (copied / "report.html").read_text()
    assert "added later" in page
    assert f"Added later, on {record.added}, from kept pictures" in page
    assert "Half right" in page
    assert str(copied.parent) not in (copied / "results.json").read_text()


def test_gathering_again_keeps_it_with_the_very_pictures_that_it_was_computed_of(copied: Path) -> None:
    assert add(copied, own(copied)).exit_code == 0
    before = read_pictures(copied / PICTURES_FILE)
    assert CliRunner().invoke(main, ["report", str(copied)]).exit_code == 0
    after = read_pictures(copied / PICTURES_FILE)
    np.testing.assert_array_equal(after.metrics["mine.py:red"], before.metrics["mine.py:red"])
    # A picture that was drawn anew has no value, until the same command gives it one.
    file = copied / "runs" / "mine-seed0" / PICTURES_FILE
    cell = read_pictures(file)
    row = int(np.flatnonzero(cell.set == "test")[0])
    other = int(np.flatnonzero(cell.set == "test")[1])
    assert cell.sha256 is not None
    (copied / KEPT_FOLDER / kept_name(cell, row)).write_bytes(
        (copied / KEPT_FOLDER / kept_name(cell, other)).read_bytes()
    )
    cell.sha256[row] = cell.sha256[other]
    write_pictures(cell, file)
    plan = plan_of(copied)
    assert plan is not None
    gather(plan, copied)
    lost = read_pictures(copied / PICTURES_FILE).metrics["mine.py:red"]
    assert int(np.isnan(lost).sum()) == int(np.isnan(before.metrics["mine.py:red"]).sum()) + 1
    result = add(copied, own(copied))
    assert result.exit_code == 0, result.output
    assert "mine.py:red: 1 pictures" in result.stdout
    filled = read_pictures(copied / PICTURES_FILE).metrics["mine.py:red"]
    assert int(np.isnan(filled).sum()) == int(np.isnan(before.metrics["mine.py:red"]).sum())
    assert add(copied, own(copied)).exit_code == 2


def test_a_comparison_that_was_stopped_is_gathered_first(copied: Path) -> None:
    (copied / "results.json").unlink()
    assert add(copied, own(copied)).exit_code == 0
    assert "mine.py:red" in read_results(copied / "results.json").metrics


def test_diversity_is_that_of_each_prompts_own_pictures(copied: Path) -> None:
    """As it was computed with the others, though it is asked for under another name."""
    live = read_pictures(copied / PICTURES_FILE).metrics["diversity"]
    plan = plan_of(copied)
    assert plan is not None
    without = plan.task.model_copy(update={"statistics": ("sharpness",)})
    results = read_results(copied / "results.json")
    metrics = {name: record for name, record in results.metrics.items() if name != "diversity"}
    pictures = read_pictures(copied / PICTURES_FILE)
    columns = {name: column for name, column in pictures.metrics.items() if name != "diversity"}
    (copied / "plan.json").write_text(plan.model_copy(update={"task": without}).model_dump_json())
    (copied / "results.json").write_text(results.model_copy(update={"metrics": metrics}).model_dump_json())
    pictures.metrics.clear()
    pictures.metrics.update(columns)
    write_pictures(pictures, copied / PICTURES_FILE)
    base_file(copied).unlink()  # so that drawing the page gathers nothing
    assert add(copied, "diversity").exit_code == 0
    found = read_pictures(copied / PICTURES_FILE).metrics["diversity"]
    assert np.isfinite(found).sum() == np.isfinite(live).sum() > 0
    np.testing.assert_allclose(found[np.isfinite(live)], live[np.isfinite(live)], atol=2 / 255)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("accuracy", "add-metric accuracy: is there already"),
        ("brightnes", "no metric or reward 'brightnes'; did you mean 'brightness'?"),
        ("sha256={reward: brightness}", "cannot name a metric"),
        ("x={reward: brightness, at_leas: 1}", "unknown key at_leas; did you mean 'at_least'?"),
        ("x={reward: brightness", "is not YAML"),
        ("nowhere.py:red", "nowhere.py"),
        ("remote", "urls"),
        ("picky", "can judge none of the prompt sets whole"),
    ],
)
def test_what_cannot_be_added_is_told_in_one_line_and_changes_nothing(metric: str, message: str, made: Path) -> None:
    before = {file: (made / file).read_bytes() for file in ("results.json", PICTURES_FILE)}
    if metric == "picky":
        metric = f"{made.parent / 'picky.py'}:Picky"
        (made.parent / "picky.py").write_text(PICKY)
    result = add(made, metric)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert {file: (made / file).read_bytes() for file in before} == before


def test_a_reward_that_breaks_half_way_changes_nothing(copied: Path) -> None:
    before = (copied / "results.json").read_bytes(), (copied / PICTURES_FILE).read_bytes()
    body = (
        "calls.append(1)\n    if len(calls) == 2: raise RuntimeError('no network')\n    return images.mean((1, 2, 3))"
    )
    result = add(copied, own(copied, f"{body}\n\ncalls = []"))
    assert result.exit_code == 2, (result.output, result.exception)
    assert "no network" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2  # that a file of one's own is run is said too
    assert ((copied / "results.json").read_bytes(), (copied / PICTURES_FILE).read_bytes()) == before


@pytest.mark.parametrize("damage", ["missing", "changed", "none kept", "another prompt", "no plan"])
def test_a_folder_that_is_not_whole_is_refused_in_one_line(damage: str, copied: Path) -> None:
    pictures = read_pictures(copied / PICTURES_FILE)
    first, second = (copied / KEPT_FOLDER / kept_name(pictures, row) for row in (0, 1))
    messages = {
        "missing": "1 missing of",
        "changed": "1 changed of",
        "none kept": "kept no pictures; make it again with --keep-pictures",
        "another prompt": "the prompts of test are others by now",
        "no plan": "has no plan.json",
    }
    if damage == "missing":
        first.unlink()
    elif damage == "changed":
        first.write_bytes(second.read_bytes() + b"x")
    elif damage == "none kept":
        bare = {key: getattr(pictures, key) for key in ("entry", "seed", "checkpoint", "guidance", "set", "prompt")}
        table = type(pictures)(**bare, image=pictures.image, metrics=pictures.metrics)
        write_pictures(table, copied / PICTURES_FILE)
    elif damage == "another prompt":
        text = (copied / "results.json").read_text()
        results = read_results(copied / "results.json")
        (copied / "results.json").write_text(text.replace(results.sets["test"].prompts[0].text, "something else"))
    else:
        (copied / "plan.json").unlink()
    before = (copied / PICTURES_FILE).read_bytes()
    result = add(copied, own(copied))
    assert result.exit_code == 2, (result.output, result.exception)
    assert messages[damage] in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert (copied / PICTURES_FILE).read_bytes() == before
