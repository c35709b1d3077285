"""What lies at the places that a comparison names: another than it was begun with is told, and nothing is added."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from dgpo_bench.base import evaluator_of
from dgpo_bench.contents import hold_to_contents, hold_to_metrics
from dgpo_bench.plan import Plan, base_file
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import sampled_sets
from dgpo_bench.records import Sampling, Trial, write_record
from dgpo_bench.tune import _undrawn
from dgpo_bench.written import BaseRecord
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.training.build import build_trainer
from tests.dgpo_plugin.adapters.test_worn_adapters import exported

TASK = {
    "version": 1,
    "prompts": {"train": "train.txt", "validation": "validation.txt", "test": "test.txt"},
    "rewards": {"red": {"reward": "own.py:red"}},
    "in_domain": [{"metric": "red"}],
    "sampling": {"steps": 2, "guidance": 1, "guidances": [1, 2], "images_per_prompt": 2},
}
ALGORITHM = {"algorithm": {"name": "dgpo", "timesteps": 1, "noisiest_steps": 2, "rollout_guidance": 1}}
SIZE = {"evaluations": 60, "seeds": 1, "schedule": [0.5]}


def own_comparison(folder: Path, **model: Any) -> Path:
    """A preset of one's own, its model, task, prompts and reward beside it."""
    shutil.copytree(world_pipeline("shapes"), folder / "base", dirs_exist_ok=True)
    preset = {
        "description": "own",
        "task": "task.yaml",
        "shared": {
            "model": {"path": str(folder / "base"), "max_sequence_length": 1, "precision": "fp32", **model},
            "lora": {"rank": 2},
            "rollout": {"steps": 2},
            "training": {"prompts_per_iteration": 2, "group_size": 2},
        },
        "algorithms": {"dgpo": ALGORITHM},
        "challenger": "dgpo",
        "sizes": dict.fromkeys(("quick", "default", "full"), SIZE),
        "search": {"dgpo": {"training.learning_rate": {"low": 1e-4, "high": 1e-3}}},
    }
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    (folder / "own.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    texts = {"train": "a red circle\na blue square\n", "validation": "a green circle\n", "test": "a red square\n"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder / "preset.yaml"


def plan_for(folder: Path) -> Plan:
    preset, task = load_preset(str(folder / "preset.yaml"))
    return Plan.of("own", preset, task, "quick", preset.sized("quick"), ["dgpo"], jobs=1)


def held(folder: Path, entry: str | None = None) -> None:
    """What a process does that starts now."""
    plan = plan_for(folder)
    trainer = build_trainer(plan.run_config("dgpo", 0) if entry else plan.base_config())
    hold_to_contents(folder / "out", trainer, sampled_sets(plan.task, plan.size), entry)


def other_weights(folder: Path) -> None:
    file = folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 0.5}, file)


def other_adapter(folder: Path) -> None:
    exported(folder / "worn.safetensors", 0.2)


def other_lines(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / f"{name}.txt").write_text("a yellow triangle\na green triangle\n")

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the base's weights": (other_weights, "base's transformer"),
    "the adapter that it wears": (other_adapter, "model.adapter ("),
    "prompts to train on": (other_lines("train"), "prompts.train ("),
    "prompts to test on": (other_lines("test"), "the test prompts"),
}


@pytest.mark.fast
@pytest.mark.parametrize("entry", [None, "dgpo"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named(name: str, entry: str | None, tmp_path: Path) -> None:
    change, told = CHANGES[name]
    worn = {"adapter": str(tmp_path / "worn.safetensors")} if "adapter" in name else {}
    if worn:
        exported(tmp_path / "worn.safetensors", 0.1)
    own_comparison(tmp_path, **worn)
    held(tmp_path)
    held(tmp_path, entry)  # nothing has changed
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json")}
    change(tmp_path)
    with pytest.raises(UserError, match="what it was begun with has changed") as refused:
        held(tmp_path, entry)
    assert told in str(refused.value)
    assert ";" not in str(refused.value).rpartition("has changed: ")[2].partition("; choose")[0], "and nothing else is"
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json")} == before


@pytest.mark.fast
def test_what_an_entry_alone_reads_is_held_to_the_entry(tmp_path: Path) -> None:
    """Other prompts of its own are not those of the base's configuration."""
    own_comparison(tmp_path)
    held(tmp_path)
    plan = plan_for(tmp_path)
    config = plan.run_config("dgpo", 0)
    (tmp_path / "others.txt").write_text("a yellow ring\n")
    prompts = config.prompts.model_copy(update={"train": str(tmp_path / "others.txt")})
    config = config.model_copy(update={"prompts": prompts})
    sets = sampled_sets(plan.task, plan.size)
    hold_to_contents(tmp_path / "out", build_trainer(config), sets, "dgpo")
    (tmp_path / "others.txt").write_text("a yellow triangle\n")
    with pytest.raises(UserError, match=r"others\.txt"):
        hold_to_contents(tmp_path / "out", build_trainer(config), sets, "dgpo")


@pytest.mark.fast
def test_metrics_of_other_code_are_refused(tmp_path: Path) -> None:
    own_comparison(tmp_path)
    plan = plan_for(tmp_path)
    trainer = build_trainer(plan.base_config())
    evaluator = evaluator_of(plan, trainer, missing={})
    hold_to_metrics(tmp_path, evaluator)  # the base was not measured yet
    records = {name: measure.record for name, measure in evaluator.measures.items()}
    sampling = Sampling(sampler="euler", steps=2, guidance=1, guidances=[1, 2], precision="fp32", width=64, height=64)

    def measured(version: str) -> None:
        found = {**records, "red": records["red"].model_copy(update={"version": version})}
        record = BaseRecord(
            guidance=1, metrics=found, sets={}, sampling=sampling, gallery_prompts=[], denoiser_evaluations=0
        )
        write_record(record, base_file(tmp_path))

    measured(records["red"].version)
    hold_to_metrics(tmp_path, evaluator)
    measured("of before")
    with pytest.raises(UserError, match=r"metric red \(version of before, now "):
        hold_to_metrics(tmp_path, evaluator)


@pytest.mark.fast
def test_trials_share_all_settings_that_are_not_drawn(tmp_path: Path) -> None:
    own_comparison(tmp_path)
    plan = plan_for(tmp_path)
    trials = [
        Trial(entry="dgpo", number=0, settings={"training.learning_rate": rate}, value=None, denoiser_evaluations=0)
        for rate in (1e-4, 1e-3)
    ]
    assert _undrawn(plan, trials[0]) == _undrawn(plan, trials[1])
    values = yaml.safe_load((tmp_path / "preset.yaml").read_text())
    values["shared"]["training"]["learning_rate"] = 5e-4
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(values))
    assert _undrawn(plan_for(tmp_path), trials[0]) == _undrawn(plan, trials[0]), (
        "what is drawn may have another default"
    )
    values["shared"]["lora"]["rank"] = 3
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(values))
    assert _undrawn(plan_for(tmp_path), trials[0]) != _undrawn(plan, trials[0])


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dgpo_bench.commands", *arguments, "--output", str(folder / "out"), "--jobs", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reward", "prompts"])
def test_a_comparison_of_something_else_now_is_refused_before_anything_is_added(what: str, tmp_path: Path) -> None:
    compare = ("compare", str(own_comparison(tmp_path)), "--size", "quick")
    assert (first := command(tmp_path, *compare)).returncode == 0, first.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    if what == "reward":
        (tmp_path / "own.py").write_text("def red(images, prompts):\n    return images[:, 1].mean((1, 2))\n")
    else:
        other_lines("train")(tmp_path)
    grown = command(tmp_path, *compare, "--seeds", "2")
    assert grown.returncode == 2, (grown.stdout, grown.stderr)
    (line,) = [each for each in grown.stderr.splitlines() if "has changed" in each]
    assert ("own.py:red" if what == "reward" else "prompts.train") in line
    assert not [*(tmp_path / "out" / "runs").glob("dgpo-seed1/cell.json")]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    again = command(tmp_path, *compare)
    assert again.returncode == 0, "what is finished needs nothing anew"


@pytest.mark.slow
def test_a_search_over_something_else_now_is_refused_and_no_trial_is_called_failed(tmp_path: Path) -> None:
    tune = ("tune", str(own_comparison(tmp_path)), "--size", "quick")
    assert (first := command(tmp_path, *tune, "--trials", "1")).returncode == 0, first.stderr
    other_weights(tmp_path)
    grown = command(tmp_path, *tune, "--trials", "2")
    assert grown.returncode == 2, (grown.stdout, grown.stderr)
    assert "base's transformer" in grown.stderr
    assert json.loads((tmp_path / "out" / "tuning.json").read_text())["finished"] == ["dgpo:0"]
