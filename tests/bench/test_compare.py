"""The harness end to end on a budget of seconds: equal cost, continuation, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from dgpo_bench.cli import main, sized
from dgpo_bench.evaluate import palette_error
from dgpo_bench.plan import Event, Forecast, Plan, base_file, run_file, run_folder
from dgpo_bench.preset import bench_preset_names, load_preset
from dgpo_bench.results import Results, read_results
from dgpo_bench.single import measure_base, run_one
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.worlds.shapes.render import BACKGROUND, SceneObject, draw

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
        size |= {"prompts_per_task": 1, "out_of_domain_prompts": 1, "schedule": [0.5]}
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


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "shape"], "did you mean 'shapes'"),
        (["compare", "shapes", "--algorithms", "dgpo,flowgrpo"], "did you mean 'flow-grpo'"),
        (["compare", "shapes", "--size", "ful"], "choose quick, default or full; did you mean 'full'"),
        (["compare", "shapes", "--evaluations", "0"], "more than nothing"),
        (["report", "nowhere"], "nowhere/results.json"),
        (["evaluate", "shapes", "--adapter", "no.safetensors"], "no.safetensors"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.fast
def test_every_shipped_size_is_larger_than_the_one_before() -> None:
    for name in bench_preset_names():
        preset = load_preset(name)
        quick, default, full = (preset.sizes[size] for size in ("quick", "default", "full"))
        assert quick.evaluations < default.evaluations < full.evaluations
        assert quick.prompts_per_task < default.prompts_per_task <= full.prompts_per_task
        assert "prove" in quick.caution
        assert not full.caution
        assert preset.evaluation.guidance in preset.evaluation.guidances


@pytest.mark.fast
def test_a_preset_without_a_size_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    del values["sizes"]["full"]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="sizes: .*lacks full"):
        load_preset(str(path))


@pytest.mark.fast
def test_algorithms_that_start_from_different_bases_are_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    values["algorithms"]["dgpo"]["model"] = {"resolution": 32}
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="must start from one base"):
        load_preset(str(path))


@pytest.mark.fast
def test_the_command_line_changes_a_size() -> None:
    preset = load_preset("shapes")
    assert sized(preset, "full", None, None) == preset.sizes["full"]
    changed = sized(preset, "full", 7, 1234)
    assert (changed.seeds, changed.evaluations) == (7, 1234)
    assert changed.prompts_per_task == preset.sizes["full"].prompts_per_task


@pytest.mark.fast
def test_shipped_presets_share_what_must_be_equal() -> None:
    for name in bench_preset_names():
        preset = load_preset(name)
        configs = [preset.run_config(algorithm, 0) for algorithm in preset.algorithms]
        assert {config.lora for config in configs} == {configs[0].lora}
        assert {config.prompts for config in configs} == {configs[0].prompts}
        assert {config.model for config in configs} == {configs[0].model}
        geometry = {(c.training.prompts_per_iteration, c.training.group_size, c.rollout.steps) for c in configs}
        assert len(geometry) == 1


@pytest.mark.fast
def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        read_results(tmp_path / "results.json")
    assert Results.model_fields["schema_version"].default == 2


def picture(*things: SceneObject) -> np.ndarray:
    return draw(list(things))


@pytest.mark.fast
def test_the_palette_error_notices_other_colours() -> None:
    sharp = picture(SceneObject("square", "red", 20, 20, 8), SceneObject("circle", "blue", 44, 44, 8))
    faded = sharp * 0.6
    assert palette_error(faded[None]) > palette_error(sharp[None]) + 0.05
    blank = np.broadcast_to(BACKGROUND[:, None, None], sharp.shape).astype(np.float32)
    assert palette_error(blank[None]) == 0


class Killed(BaseException):
    """Stands for SIGKILL."""


class Ear:
    """A listener that notes, and kills after so many evaluations."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.heard: list[Event] = []
        self._kill_after = kill_after

    def expect(self, forecast: Forecast) -> None:
        raise AssertionError("a run forecasts nothing")

    def listen(self, event: Event) -> None:
        self.heard.append(event)
        if not event.evaluated and sum(each.evaluated for each in self.heard) == self._kill_after:
            raise Killed


@pytest.mark.slow
def test_a_run_killed_half_way_goes_on_from_its_last_evaluation(tmp_path: Path) -> None:
    """Equal evaluations make it exact: the adapter is that of a run that was not killed, bit for bit."""
    preset = load_preset(small_preset(tmp_path))
    plan = Plan(
        preset_name="small",
        preset=preset,
        size_name="quick",
        size=sized(preset, "quick", 1, EVALUATIONS),
        algorithms=["dgpo"],
        seeds=[0],
        jobs=1,
        threads=1,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    measure_base(plan, whole)
    broken.mkdir()
    shutil.copy(base_file(whole), base_file(broken))
    run_one(plan, whole, "dgpo", 0, Ear())
    with pytest.raises(Killed):
        run_one(plan, broken, "dgpo", 0, Ear(kill_after=1))
    assert not run_file(broken, "dgpo", 0).exists()
    ear = Ear()
    run_one(plan, broken, "dgpo", 0, ear)
    assert sum(event.evaluated for event in ear.heard) == 1  # the last; the one before is kept
    folders = [run_folder(folder, "dgpo", 0) for folder in (whole, broken)]
    done = [json.loads((folder / "run.json").read_text())["evaluations"] for folder in folders]
    assert [e["metrics"] for e in done[0]] == [e["metrics"] for e in done[1]]
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["reward"] for line in lines[0]] == [line["reward"] for line in lines[1]]
    adapters = [load_file(folder / "adapter.safetensors") for folder in folders]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not (folders[1] / "checkpoints").exists()
