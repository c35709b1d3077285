"""The harness end to end on a budget of seconds: equal cost, continuation, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from dgpo_bench.commands import main
from dgpo_bench.preset import bench_preset_names
from dgpo_bench.results import read_results

EVALUATIONS = 1500


def small_preset(folder: Path) -> str:
    """The shipped comparison with everything that costs time made small."""
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    values["shared"]["rollout"] = {"steps": 4}
    values["shared"]["training"] |= {"prompts_per_iteration": 4, "group_size": 4}
    values["algorithms"]["dgpo"]["algorithm"] |= {"noisiest_steps": 3, "timesteps": 2}
    values["algorithms"]["flow-grpo-fast"]["algorithm"] |= {"window": 1, "window_range": 2}
    for name in ("flow-grpo", "flow-grpo-fast"):
        values["algorithms"][name]["training"]["updates_per_iteration"] = 2
    values["evaluation"] |= {"images_per_prompt": 2, "steps": 3, "guidances": [1, 2]}
    for size in values["sizes"].values():
        size |= {"prompts_per_task": 1, "out_of_domain_prompts": 1, "schedule": [0.5], "guidances": None}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def compare(preset: str, output: Path, *extra: str) -> Result:
    arguments = ["compare", preset, "--size", "quick", "--output", str(output), "--threads", "1", *extra]
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    preset = small_preset(folder)
    result = compare(preset, folder / "out", "--evaluations", str(EVALUATIONS))
    assert result.exit_code == 0, (result.output, result.exception)
    return preset, folder / "out"


@pytest.mark.slow
def test_every_run_is_there_and_within_the_budget(finished: tuple[str, Path]) -> None:
    results = read_results(finished[1] / "results.json")
    assert results.complete
    assert sorted(run.algorithm for run in results.runs) == ["dgpo", "flow-grpo", "flow-grpo-fast"]
    for run in results.runs:
        first, *_, last = run.evaluations
        assert (first.iteration, first.seconds, first.denoiser_evaluations) == (0, 0, 0)
        # Iterations differ in cost (images without an advantage are dropped), so the last may end a little over.
        assert 0.5 * EVALUATIONS < last.denoiser_evaluations <= 1.1 * EVALUATIONS
        assert last.seconds > 0
        assert set(first.metrics) == set(results.metrics)
        assert (finished[1] / run.adapter).exists()
        costs = [evaluation.denoiser_evaluations for evaluation in run.evaluations]
        assert costs == sorted(costs)
        assert len(costs) >= 3


@pytest.mark.slow
def test_all_runs_start_from_the_same_base(finished: tuple[str, Path]) -> None:
    results = read_results(finished[1] / "results.json")
    bases = [run.evaluations[0].metrics for run in results.runs]
    assert all(base == bases[0] for base in bases)
    assert bases[0]["drift"] == pytest.approx(0, abs=1e-9)
    assert {settings["lora"]["rank"] for settings in results.settings.values()} == {16}


@pytest.mark.slow
def test_the_base_is_measured_once_and_everyone_at_every_guidance(finished: tuple[str, Path]) -> None:
    results = read_results(finished[1] / "results.json")
    assert [each.guidance for each in results.base] == [1, 2, 3]
    for run in results.runs:
        assert [each.guidance for each in run.guided] == [1, 2, 3]
        # The preset's own guidance is that of the curves.
        assert run.evaluations[0].metrics == results.base[2].metrics
        assert run.evaluations[-1].metrics == run.guided[2].metrics
    assert results.base[0].metrics["accuracy"] != results.base[2].metrics["accuracy"]
    assert results.budget.size == "quick"
    assert results.budget.evaluations == EVALUATIONS
    assert [str(path.relative_to(finished[1])) for path in finished[1].rglob("base.*")] != []
    assert len(list(finished[1].rglob("base.json"))) == len(list(finished[1].rglob("base.png"))) == 1


@pytest.mark.slow
def test_files_for_people_and_programs(finished: tuple[str, Path]) -> None:
    folder = finished[1]
    html = (folder / "report.html").read_text()
    assert "DGPO" in html
    assert html.count("data:image/png;base64,") >= 4
    with (folder / "curves.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(len(run.evaluations) for run in read_results(folder / "results.json").runs)
    assert "accuracy" in rows[0]


@pytest.mark.slow
def test_report_is_drawn_again_from_the_results(finished: tuple[str, Path]) -> None:
    before = (finished[1] / "report.html").read_text()
    (finished[1] / "report.html").unlink()
    assert CliRunner().invoke(main, ["report", str(finished[1])]).exit_code == 0
    assert (finished[1] / "report.html").read_text() == before


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_with_what_is_missing(finished: tuple[str, Path]) -> None:
    preset, folder = finished
    kept = folder / "runs" / "dgpo-seed0" / "run.json"
    lost = folder / "runs" / "flow-grpo-fast-seed0" / "run.json"
    stamp, before = kept.stat().st_mtime_ns, json.loads(lost.read_text())["evaluations"]
    lost.unlink()
    result = compare(preset, folder, "--evaluations", str(EVALUATIONS))
    assert result.exit_code == 0, result.output
    assert kept.stat().st_mtime_ns == stamp
    after = json.loads(lost.read_text())["evaluations"]
    # The same seed gives the same numbers; only the clock differs.
    assert [e["metrics"] for e in after] == [e["metrics"] for e in before]
    assert read_results(folder / "results.json").complete


@pytest.mark.slow
def test_another_plan_does_not_mix_with_an_old_folder(finished: tuple[str, Path]) -> None:
    preset, folder = finished
    result = compare(preset, folder, "--evaluations", str(EVALUATIONS + 1))
    assert result.exit_code == 2
    assert "another size" in result.stderr


@pytest.mark.slow
def test_a_budget_for_no_iteration_is_refused(tmp_path: Path) -> None:
    result = compare(small_preset(tmp_path), tmp_path / "out", "--evaluations", "10", "--algorithms", "dgpo")
    assert result.exit_code == 2
    assert "one iteration of dgpo takes" in result.stderr
    assert not (tmp_path / "out" / "results.json").exists()
