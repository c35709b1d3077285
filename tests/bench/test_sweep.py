"""A sweep from end to end on the shipped pipeline: what is drawn, going on, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from dgpo_bench.asked import asked_sweep
from dgpo_bench.commands import main
from dgpo_bench.meter import Meter
from dgpo_bench.pictures import PICTURES_FILE, read_pictures
from dgpo_bench.records import KEPT_FOLDER
from dgpo_bench.sweep import sweep_cost
from dgpo_bench.sweep_records import Setting, read_sweep
from dgpo_plugin.common.errors import UserError
from tests.bench.test_compare import small_preset
from tests.bench.test_finished_adapters import exported

AXES = ("0,1", "2,3", "2,3")
OPTIONS = [part for pair in zip(("--strengths", "--steps", "--guidances"), AXES, strict=True) for part in pair]


def swept(folder: Path, *extra: str, out: str = "out", adapter: str = "mine", options: list[str] = OPTIONS) -> Result:
    arguments = [str(folder / "small.yaml"), "--adapter", str(folder / adapter), "--output", str(folder / out)]
    return CliRunner().invoke(main, ["sweep", *arguments, *options, "--prompts", "3", *extra])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A preset, two adapters, and the sweep of one with its pictures kept; tests change copies."""
    folder = tmp_path_factory.mktemp("sweep")
    small_preset(folder)
    exported(folder / "mine", 0.3)
    exported(folder / "other", 0.2)
    result = swept(folder, "--keep-pictures")
    assert result.exit_code == 0, (result.output, result.exception)
    return folder, result


@pytest.mark.fast
def test_every_setting_draws_the_same_prompts_and_the_base_is_beside_it(made: tuple[Path, Result]) -> None:
    folder, result = made
    record, pictures = read_sweep(folder / "out"), read_pictures(folder / "out" / PICTURES_FILE)
    assert record.complete
    guidance = record.center.guidance
    expected = {(s, 3, g) for s in (0, 1) for g in (2, 3)} | {(s, 2, guidance) for s in (0, 1)}
    assert {(each.strength, each.steps, each.guidance) for each in record.settings} == expected
    keys = None
    for each in record.settings:
        rows = pictures.where((pictures.entry == each.entry) & (pictures.guidance == each.guidance))
        found = list(zip(rows.set.tolist(), rows.prompt.tolist(), rows.image.tolist(), strict=True))
        assert keys is None or found == keys
        keys = found
        assert (folder / "out" / record.galleries[each.name]).is_file()
    assert keys is not None
    assert len(keys) == 2 * sum(len(each.prompts) for each in record.sets.values())
    assert not np.isnan(pictures.metrics["accuracy"]).any()
    assert not np.isnan(pictures.metrics["diversity"]).any()
    assert len(pictures.kept()) == len(pictures) == len(list((folder / "out" / KEPT_FOLDER).rglob("*.webp")))
    said = result.stdout
    assert "6 settings, 72 pictures" in said
    assert "keeps 72 pictures of 64 x 64 at most" in said
    assert f"kept {len(pictures)} pictures" in said
    assert "denoiser evaluations/s, about" in said


@pytest.mark.fast
def test_it_takes_what_was_said_beforehand(made: tuple[Path, Result]) -> None:
    folder, _ = made
    plan = asked_sweep(str(folder / "small.yaml"), None, folder / "mine", AXES, 3, True, folder / "out")
    record, pictures = read_sweep(folder / "out"), read_pictures(folder / "out" / PICTURES_FILE)
    # Every guidance is above 1, so that whichever is the best costs as much.
    assert sweep_cost(plan) == (len(record.settings), len(pictures), record.denoiser_evaluations)


@pytest.mark.fast
def test_strength_zero_is_the_base_whatever_the_adapter(made: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = made
    few = ["--strengths", "1", "--steps", "3", "--guidances", "2"]
    result = swept(folder, out="other-out", adapter="other", options=few)
    assert result.exit_code == 0, (result.output, result.exception)
    tables = [read_pictures(folder / name / PICTURES_FILE) for name in ("out", "other-out")]
    columns = {}
    for strength in (0.0, 1.0):
        entry = Setting(strength=strength, steps=3, guidance=2).entry
        rows = [table.where((table.entry == entry) & (table.guidance == 2)) for table in tables]
        columns[strength] = [each.metrics["sharpness"] for each in rows]
    np.testing.assert_array_equal(*columns[0.0])
    assert not np.array_equal(*columns[1.0])
    assert not np.array_equal(columns[0.0][0], columns[1.0][0])


@pytest.mark.fast
def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(made: tuple[Path, Result], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(made[0], folder)
    out = folder / "out"
    before, record = read_pictures(out / PICTURES_FILE), read_sweep(out)
    lost = record.settings[-1]
    (out / "settings" / f"{lost.name}.csv.gz").unlink()
    stamps = {file: file.stat().st_mtime_ns for file in (out / "settings").glob("*.csv.gz")}
    assert CliRunner().invoke(main, ["report", str(out)]).exit_code == 0
    assert "Incomplete" in (out / "sweep.html").read_text()
    result = swept(folder, "--keep-pictures")  # of the same adapter, which lies elsewhere by now
    assert result.exit_code == 0, (result.output, result.exception)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    after = read_pictures(out / PICTURES_FILE)
    for name, column in before.metrics.items():
        np.testing.assert_array_equal(after.metrics[name], column)
    assert read_sweep(out).complete
    assert "Incomplete" not in (out / "sweep.html").read_text()


@pytest.mark.fast
def test_before_the_guidances_are_through_there_is_nothing_to_draw(made: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0] / "out", out)
    for file in (out / "settings").glob("strength1.0*.csv.gz"):
        file.unlink()
    for file in (out / "settings").glob("strength1-*.csv.gz"):
        file.unlink()
    (out / "sweep.json").unlink()
    result = CliRunner().invoke(main, ["report", str(out)])
    assert result.exit_code == 2
    assert "has not come through its guidances yet" in result.stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("strengths", "holds a sweep with another strengths"),
        ("adapter", "holds a sweep with another adapter_sha256"),
        ("content", "holds a sweep with another adapter_sha256"),
        ("keep", "another task, model or --keep-pictures"),
        ("comparison", "not a comparison's plan; choose another --output"),
    ],
)
def test_another_sweep_does_not_mix_with_an_old_folder(what: str, message: str, made: tuple[Path, Result]) -> None:
    folder, before = made[0], (made[0] / "out" / PICTURES_FILE).read_bytes()
    if what == "strengths":
        result = swept(folder, "--keep-pictures", options=["--strengths", "0,1,2", *OPTIONS[2:]])
    elif what == "adapter":
        result = swept(folder, "--keep-pictures", adapter="other")
    elif what == "content":
        file = folder / "mine" / "adapter.safetensors"
        whole = file.read_bytes()
        file.write_bytes((folder / "other" / "adapter.safetensors").read_bytes())
        result = swept(folder, "--keep-pictures")
        file.write_bytes(whole)
    elif what == "keep":
        result = swept(folder)
    else:
        result = CliRunner().invoke(
            main, ["evaluate", str(folder / "small.yaml"), "--base", "--output", str(folder / "out")]
        )
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert (folder / "out" / PICTURES_FILE).read_bytes() == before


@pytest.mark.fast
@pytest.mark.parametrize("source", ["words", "shape", "geneval"])
def test_another_base_or_no_such_task_is_one_line_and_leaves_nothing(source: str, made: tuple[Path, Result]) -> None:
    messages = {
        "words": "was trained on shapes with another transformer than words's",
        "shape": "no comparison preset 'shape'; did you mean 'shapes",
        "geneval": "a task knows no model; name it with --model",
    }
    out = made[0] / f"out-{source}"
    result = CliRunner().invoke(main, ["sweep", source, "--adapter", str(made[0] / "mine"), "--output", str(out)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert messages[source] in result.stderr
    assert not out.exists()


@pytest.mark.fast
def test_a_metric_is_added_to_a_sweep_too(made: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0] / "out", out)
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    result = CliRunner().invoke(main, ["add-metric", str(out), f"{tmp_path / 'mine.py'}:red"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert read_sweep(out).metrics["mine.py:red"].added
    assert np.isfinite(read_pictures(out / PICTURES_FILE).metrics["mine.py:red"]).all()
    assert "mine.py:red" in (out / "sweep.html").read_text()


@pytest.mark.fast
def test_a_meter_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dgpo_bench.meter.time.monotonic", lambda: now[0])
    meter = Meter(Console(), "sweep", "pictures")
    meter.start(40)
    assert meter.rate == ""
    now[0] += 5
    meter.advance(10)
    assert meter.rate == "2 pictures/s, about 15 s left"
    meter.expect(10)
    assert meter.rate == "2 pictures/s, about 5 s left"


@pytest.mark.fast
def test_a_folder_of_a_comparison_is_not_swept_into(made: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="not a sweep's plan; choose another --output"):
        asked_sweep(str(made[0] / "small.yaml"), None, made[0] / "mine", AXES, 3, False, tmp_path)
