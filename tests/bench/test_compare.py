"""The harness end to end on a budget of seconds: equal cost, continuation, failed cells, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from dgpo_bench import commands
from dgpo_bench.commands import main
from dgpo_bench.commit import git_hash
from dgpo_bench.gather import commits
from dgpo_bench.pictures import KEYS, PICTURES_FILE, Pictures, read_pictures
from dgpo_bench.preset import bench_preset_names
from dgpo_bench.records import CellRecord, Results, read_results

EVALUATIONS = 1500


def small_values() -> dict[str, Any]:
    """The shipped comparison with everything that costs time made small."""
    values: dict[str, Any] = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    values["guidance"] = 2
    values["shared"]["rollout"] = {"steps": 4}
    values["shared"]["training"] |= {"prompts_per_iteration": 4, "group_size": 4}
    values["algorithms"]["dgpo"]["algorithm"] |= {"noisiest_steps": 3, "timesteps": 2}
    values["algorithms"]["flow-grpo-fast"]["algorithm"] |= {"window": 1, "window_range": 2}
    for name in ("flow-grpo", "flow-grpo-fast"):
        values["algorithms"][name]["training"]["updates_per_iteration"] = 2
        values["algorithms"][name]["algorithm"]["keep_graphs"] = False  # graphs are good for one update
    few = {"test_prompts": 2, "validation_prompts": 1, "out_of_domain_prompts": 2, "curve_prompts": 1}
    for size in values["sizes"].values():
        size |= {**few, "images_per_prompt": 2, "schedule": [0.3], "guidances": [1, 2], "controls": []}
        size["base_validation_images"] = 3
    return values


def small_preset(folder: Path) -> str:
    """That comparison's file, with a task of three sampler steps beside it."""
    from dgpo_bench.task import task_names

    values, shipped = small_values(), task_names()["shapes"]
    task = yaml.safe_load(shipped.read_text())
    task["sampling"]["steps"] = 3
    for role in ("validation", "test"):
        task["prompts"][role] = str(shipped.parent / task["prompts"][role])
    (folder / "small-task.yaml").write_text(yaml.safe_dump(task))
    values["task"] = "small-task.yaml"
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def compare(preset: str, output: Path, *extra: str) -> Result:
    arguments = ["compare", preset, "--size", "quick", "--output", str(output), "--threads", "1", *extra]
    return CliRunner().invoke(main, arguments)


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Any:
    """Drawing the report is tested where it is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_draw", lambda folder: [f"report: {folder}"])
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    preset = small_preset(folder)
    result = compare(preset, folder / "out", "--evaluations", str(EVALUATIONS), "--controls", "zero,best-of-n")
    assert result.exit_code == 0, (result.output, result.exception)
    return preset, folder / "out"


def found(folder: Path) -> tuple[Results, Pictures]:
    return read_results(folder / "results.json"), read_pictures(folder / PICTURES_FILE)


@pytest.mark.slow
def test_every_cell_is_there_and_within_the_budget(finished: tuple[str, Path]) -> None:
    results, _ = found(finished[1])
    assert results.complete
    assert {bool(cell.commit) for cell in results.cells} == {bool(git_hash())}
    assert [cell.entry for cell in results.cells] == ["dgpo", "flow-grpo", "flow-grpo-fast", "zero"]
    for cell in results.cells:
        first, *_, last = cell.checkpoints
        assert (first.iteration, first.denoiser_evaluations, first.total_seconds) == (0, 0, 0)
        # Iterations differ in cost (images without an advantage are dropped), so the last may end a little over.
        assert last.denoiser_evaluations <= 1.1 * EVALUATIONS
        assert cell.entry == "zero" or last.denoiser_evaluations > 0.5 * EVALUATIONS
        assert {"rollout", "training"} <= set(last.seconds)
        assert last.images_scored == last.iteration * 16
        assert last.flops is not None
        assert last.flops > 0
        assert cell.peak_memory
        assert (finished[1] / cell.adapter).exists()
        costs = [checkpoint.denoiser_evaluations for checkpoint in cell.checkpoints]
        assert costs == sorted(costs)
        assert len(costs) == 3


@pytest.mark.fast
def test_results_name_the_commits_of_their_cells_and_not_of_their_report() -> None:
    cells = [
        CellRecord(entry="dgpo", seed=0, status="done", commit="b"),
        CellRecord(entry="dgpo", seed=1, status="done", commit="a"),
        CellRecord(entry="dgpo", seed=2, status="done", commit="b"),
        CellRecord(entry="dgpo", seed=3, status="failed", commit="c"),
    ]
    assert commits(cells) == "a, b"
    assert commits(cells[3:]) == ""


@pytest.mark.slow
def test_every_picture_has_its_row(finished: tuple[str, Path]) -> None:
    """Test and out-of-domain prompts at every guidance of the base, at the chosen one of an adapter, and the curves."""
    results, pictures = found(finished[1])
    sets = results.sets
    assert [each.role for each in sets.values()] == ["validation", "in_domain", "out_of_domain"]
    test, outside, validation = "test", "shapes/out-of-domain", "validation"
    count = {name: len(each.prompts) * 2 for name, each in sets.items()}
    for guidance in (1, 2):
        for name in sets:
            base = pictures.of("base", -1, name, guidance=guidance)
            extra = 6 * len(sets[test].prompts) if (name, guidance) == (test, results.base_guidance) else 0
            extra += len(sets[name].prompts) if name == validation else 0  # three of each for the base
            assert len(base) == count[name] + extra  # of best-of-n: eight of each prompt
    for cell in results.cells:
        last = len(cell.checkpoints) - 1
        for name in (test, outside):
            assert len(pictures.of(cell.entry, 0, name, checkpoint=last, guidance=cell.guidance)) == count[name]
            assert 0 < len(pictures.of(cell.entry, 0, name, checkpoint=1, guidance=2)) < count[name]
        assert len(pictures.of(cell.entry, 0, validation)) == 2 * count[validation]
    keys = list(zip(*(getattr(pictures, key) for key in KEYS), strict=True))
    assert len(set(keys)) == len(keys)
    assert not np.isnan(pictures.metrics["accuracy"]).any()
    assert np.isnan(pictures.of("base", -1, validation).metrics["diversity"]).all()
    assert not np.isnan(pictures.of("base", -1, outside).metrics["diversity"]).any()


@pytest.mark.slow
def test_an_adapter_that_is_told_nothing_draws_what_its_anchor_does(finished: tuple[str, Path]) -> None:
    """Without advantages only the KL term is left, whose gradient is zero at the base: nothing moves."""
    results, pictures = found(finished[1])
    (zero,) = results.cells_of("zero").values()
    assert results.entries["zero"].kind == "control"
    assert results.entries["zero"].settings["training"]["control"] == "zero"
    assert zero.checkpoints[-1].drift == pytest.approx(0, abs=1e-9)
    (dgpo,) = results.cells_of("dgpo").values()
    assert (dgpo.checkpoints[-1].drift or 0) > 1e-8
    same = pictures.of("zero", 0, "test", checkpoint=1, guidance=2)
    base = pictures.of("base", -1, "test", guidance=2)
    shared = np.isin(base.prompt, same.prompt) & (base.image < 2)
    np.testing.assert_allclose(same.metrics["brightness"], base.metrics["brightness"][shared], atol=1e-4)


@pytest.mark.slow
def test_metrics_say_what_they_have_to_do_with_training(finished: tuple[str, Path]) -> None:
    results, _ = found(finished[1])
    assert {name: metric.relation for name, metric in results.metrics.items()} == {
        "accuracy": "trained",
        "shapes": "trained",
        **dict.fromkeys(("sharpness", "color-entropy", "brightness", "jpeg-size", "diversity"), "statistic"),
    }
    assert results.task.headline == "accuracy"
    assert results.base_guidance in (1, 2)
    assert (results.sampling.steps, results.sampling.width, results.sampling.guidances) == (3, 64, [1, 2])
    assert results.command.startswith("dgpo-bench compare small --size quick --seeds 1 --evaluations 1500")


@pytest.mark.slow
def test_pictures_of_every_checkpoint_are_there(finished: tuple[str, Path]) -> None:
    results, _ = found(finished[1])
    for cell in results.cells:
        files = results.galleries[cell.entry]
        assert files[0] == "base.png"
        assert len(files) == len(cell.checkpoints)
        assert all((finished[1] / file).is_file() for file in files)
    assert 1 < len(results.gallery_prompts) <= 8


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_with_what_is_missing(finished: tuple[str, Path]) -> None:
    preset, folder = finished
    kept, lost = (folder / "runs" / f"{name}-seed0" / "cell.json" for name in ("dgpo", "flow-grpo-fast"))
    stamp, before = kept.stat().st_mtime_ns, read_pictures(folder / PICTURES_FILE)
    lost.unlink()
    arguments = ("--evaluations", str(EVALUATIONS), "--controls", "zero,best-of-n")
    result = compare(preset, folder, *arguments)
    assert result.exit_code == 0, result.output
    assert kept.stat().st_mtime_ns == stamp
    results, after = found(folder)
    # The same seed gives the same numbers; only the clock differs.
    for name, column in before.metrics.items():
        np.testing.assert_array_equal(after.metrics[name], column)
    assert results.complete


@pytest.mark.slow
def test_what_was_measured_stays_where_more_is_asked_for(finished: tuple[str, Path], tmp_path: Path) -> None:
    """The same rows as of a comparison that had all of it from the beginning."""
    preset, folder = finished
    arguments = ("--evaluations", str(EVALUATIONS))
    began = compare(preset, tmp_path, *arguments, "--algorithms", "dgpo", "--controls", "none")
    assert began.exit_code == 0, began.output
    assert [cell.entry for cell in found(tmp_path)[0].cells] == ["dgpo"]
    kept = tmp_path / "runs" / "dgpo-seed0" / "cell.json"
    stamp = kept.stat().st_mtime_ns
    result = compare(preset, tmp_path, *arguments, "--controls", "zero,best-of-n")
    assert result.exit_code == 0, result.output
    assert kept.stat().st_mtime_ns == stamp
    assert (tmp_path / PICTURES_FILE).read_bytes() == (folder / PICTURES_FILE).read_bytes()
    results, whole = found(tmp_path)[0], found(folder)[0]
    assert results.complete
    assert results.command == whole.command
    less = compare(preset, tmp_path, *arguments, "--algorithms", "dgpo", "--controls", "none")
    assert less.exit_code == 2
    assert "holds flow-grpo, flow-grpo-fast, zero, best-of-n too; name them as well" in less.stderr


@pytest.mark.slow
def test_another_plan_does_not_mix_with_an_old_folder(finished: tuple[str, Path]) -> None:
    preset, folder = finished
    result = compare(preset, folder, "--evaluations", str(EVALUATIONS + 1))
    assert result.exit_code == 2
    assert "another size" in result.stderr


@pytest.mark.slow
def test_a_failed_cell_is_a_result_and_is_tried_again_when_told(finished: tuple[str, Path]) -> None:
    preset, folder = finished
    file = folder / "runs" / "flow-grpo-seed0" / "cell.json"
    whole = file.read_text()
    reason = "reward shapes: no server is left"
    file.write_text(CellRecord(entry="flow-grpo", seed=0, status="failed", reason=reason).model_dump_json())
    arguments = ("--evaluations", str(EVALUATIONS), "--controls", "zero,best-of-n")
    result = compare(preset, folder, *arguments)
    assert result.exit_code == 0, result.output
    assert f"flow-grpo, seed 0 failed: {reason}; --retry tries it again" in result.stdout
    results, pictures = found(folder)
    assert [cell.status for cell in results.cells] == ["done", "failed", "done", "done"]
    assert "flow-grpo" not in pictures.entry
    assert compare(preset, folder, *arguments, "--retry").exit_code == 0
    results, pictures = found(folder)
    assert {cell.status for cell in results.cells} == {"done"}
    assert "flow-grpo" in pictures.entry
    again = CellRecord.model_validate_json(file.read_text())
    assert again.guidance == CellRecord.model_validate_json(whole).guidance


@pytest.mark.slow
def test_a_budget_for_no_iteration_is_refused(tmp_path: Path) -> None:
    result = compare(small_preset(tmp_path), tmp_path / "out", "--evaluations", "10", "--algorithms", "dgpo")
    assert result.exit_code == 2
    assert "one iteration of dgpo takes" in result.stderr
    assert not (tmp_path / "out" / "results.json").exists()
