"""Finished adapters compared with their base, by the command that people use."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dgpo_bench import commands
from dgpo_bench.adapters import named_adapters
from dgpo_bench.commands import main
from dgpo_bench.pictures import PICTURES_FILE, read_pictures
from dgpo_bench.plan import Plan
from dgpo_bench.preset import preset_of_task
from dgpo_bench.records import read_results
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from tests.bench.test_compare import small_preset
from tests.conftest import shapes_run, spread


def exported(folder: Path, std: float) -> Path:
    """An adapter of the shapes model that does something."""
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    policy = spread(Policy(model, LoraConfig(rank=4, alpha=4), seed=0), std)
    path = folder / "adapter.safetensors"
    folder.mkdir()
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(shapes_run(), optimizer_steps=1))
    return path


def evaluate(preset: str, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_draw", lambda folder: [f"report: {folder}"])
        return CliRunner().invoke(main, ["evaluate", preset, "--size", "quick", *arguments])


@pytest.mark.slow
def test_adapters_stand_beside_the_base_in_the_same_records(tmp_path: Path) -> None:
    preset, out = small_preset(tmp_path), tmp_path / "out"
    weak, strong = exported(tmp_path / "weak", 0.02), exported(tmp_path / "strong", 0.3)
    arguments = ["--adapter", str(weak), "--adapter", str(strong), "--output", str(out), "--keep-pictures"]
    result = evaluate(preset, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(r"keeps \d+ pictures of 64 x 64 at most, [\d.]+ MB at most", result.stdout)
    assert re.search(rf"kept \d+ pictures, [\d.]+ MB, in {re.escape(str(out))}", result.stdout)
    results, pictures = read_results(out / "results.json"), read_pictures(out / PICTURES_FILE)
    assert (list(results.entries), results.challenger, results.complete) == (["weak", "strong"], "weak", True)
    assert str(tmp_path) not in (out / "results.json").read_text()
    drift = {cell.entry: cell.checkpoints[-1].drift or 0 for cell in results.cells}
    assert drift["strong"] > 10 * drift["weak"] > 0
    base = pictures.of("base", -1, "test", guidance=2)
    for entry in ("weak", "strong"):
        rows = pictures.of(entry, 0, "test", checkpoint=1, guidance=results.cells_of(entry)[0].guidance)
        assert len(rows) == 2 * len(results.sets["test"].prompts)
    apart = [
        np.abs(of.metrics["brightness"] - base.metrics["brightness"][np.isin(base.prompt, of.prompt)]).mean()
        for of in (pictures.of(entry, 0, "test", checkpoint=1, guidance=2) for entry in ("weak", "strong"))
    ]
    assert apart[1] > apart[0]
    measured = [out / "base.json", *(out / "runs" / f"{entry}-seed0" / "cell.json" for entry in ("weak", "strong"))]
    before = [file.stat().st_mtime_ns for file in measured]
    more = ["--adapter", str(exported(tmp_path / "third", 0.1)), *arguments]
    assert evaluate(preset, *more).exit_code == 0
    assert [file.stat().st_mtime_ns for file in measured] == before
    assert list(read_results(out / "results.json").entries) == ["third", "weak", "strong"]
    strong.write_bytes(weak.read_bytes())  # trained anew at the same place
    refused = evaluate(preset, *more)
    assert refused.exit_code == 2
    assert f"its strong was another file than {strong}; choose another --output" in refused.stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure; give --adapter FILE, or --base"),
        (["--adapter", "no.safetensors"], "no.safetensors"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = evaluate("shapes", *arguments, "--output", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_a_task_needs_a_model(tmp_path: Path) -> None:
    result = evaluate("geneval", "--base", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "a task knows no model; name it with --model" in result.stderr


@pytest.mark.fast
def test_adapters_are_named_by_their_file_or_folder() -> None:
    named = named_adapters([Path("a/adapter.safetensors"), Path("b/mine.safetensors"), Path("c/mine.safetensors")])
    assert list(named) == ["a", "mine", "mine-2"]
    taken = [Path("a/x-2.safetensors"), Path("a/x.safetensors"), Path("b/x.safetensors"), Path("base.safetensors")]
    assert list(named_adapters(taken).items()) == [
        ("x-2", str(taken[0])),
        ("x", str(taken[1])),
        ("x-3", str(taken[2])),
        ("base-2", str(taken[3])),
    ]
    with pytest.raises(UserError, match="stands there twice"):
        named_adapters([Path("x.safetensors"), Path("x.safetensors")])


@pytest.mark.fast
def test_the_command_that_made_a_page_of_adapters_is_one_that_makes_it_again() -> None:
    preset, task = preset_of_task("shapes", "shapes")
    size = preset.sized("quick", seeds=1, controls="none")
    plan = Plan.of("shapes", preset, task, "quick", size, [], jobs=1)
    assert plan.command == "dgpo-bench evaluate shapes --size quick --model shapes --base"
    chosen = plan.model_copy(update={"size": size.model_copy(update={"guidances": (1.0, 2.5)}), "entries": ["mine"]})
    chosen = chosen.model_copy(update={"adapters": {"mine": "mine.safetensors"}})
    assert chosen.command == (
        "dgpo-bench evaluate shapes --size quick --model shapes --guidance 1 --guidance 2.5 --adapter mine.safetensors"
    )
