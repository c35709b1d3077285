"""What another package adds, one file each, is named, listed, planned, trained and compared like the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dgpo_bench.preset import bench_preset_names
from tests import outside
from tests.conftest import SMALL

CONFIG = {
    "model": {"path": "outside", "max_sequence_length": 1},
    "lora": {"rank": 4, "alpha": 8},
    "prompts": {"train": "outside/train", "held_out": "outside/pairs"},
    "rewards": {"outside": {"weight": 1}, "redness": {"weight": 0.5}},
    "algorithm": {"name": "reward-weighted", "temperature": 0.5},
}
Done = subprocess.CompletedProcess[str]
TINY = [change for change in SMALL if not change.startswith("algorithm.")]


def dgpo(
    environment: dict[str, str], *arguments: str, program: str = "dgpo_plugin"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_package_from_outside_is_listed_planned_and_trained(tmp_path: Path) -> None:
    environment = outside.install(tmp_path)
    listed = dgpo(environment, "list").stdout
    for name in ("reward-weighted", "redness", "any OutsidePipeline", "outside/pairs", "outside/train", "outside"):
        assert name in listed
    assert "how green it is" in dgpo(environment, "list", "rewards", "outside").stdout
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    settings = [part for change in TINY for part in ("--set", change)]
    planned = dgpo(environment, "plan", str(tmp_path / "run.yaml"), *settings)
    assert planned.returncode == 0, planned.stderr
    assert "8 images, 80 denoiser evaluations" in planned.stdout
    trained = dgpo(environment, "train", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"), *settings)
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward/outside", "reward/redness", "loss"} <= record.keys()
    assert (
        "1 outside + 0.5 redness" in dgpo(environment, "inspect", str(tmp_path / "run" / "adapter.safetensors")).stdout
    )


@pytest.mark.slow
def test_its_world_is_made_again_by_its_own_function(tmp_path: Path) -> None:
    environment = outside.install(tmp_path)
    made = dgpo(environment, "worlds", "pretrain", "outside", "--output", str(tmp_path / "made"), "--seed", "3")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "made" / "made.txt").read_text() == "seed 3"


@pytest.mark.slow
def test_its_algorithm_is_compared_and_reported(tmp_path: Path) -> None:
    environment = outside.install(tmp_path)
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text(encoding="utf-8"))
    values["shared"]["model"]["precision"] = "fp32"
    values["shared"]["training"] |= {"prompts_per_iteration": 2, "group_size": 4, "guard": None}
    values["shared"]["rollout"]["steps"] = 4
    values["algorithms"] = {
        "dgpo": {"algorithm": {**values["algorithms"]["dgpo"]["algorithm"], "noisiest_steps": 4}},
        "reward-weighted": {"algorithm": {"name": "reward-weighted"}},
    }
    for shown in ("labels", "colors"):
        values[shown] = {"dgpo": values[shown]["dgpo"]}
    del values["search"]
    few = {"test_prompts": 1, "validation_prompts": 1, "out_of_domain_prompts": 2, "curve_prompts": 1}
    for size in values["sizes"].values():
        size |= {**few, "images_per_prompt": 2, "schedule": [0.5], "guidances": [1, 3], "controls": []}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    output = ["--output", str(tmp_path / "out"), "--size", "quick", "--evaluations", "1200", "--jobs", "1"]
    compared = dgpo(environment, "compare", str(tmp_path / "own.yaml"), *output, program="dgpo_bench.commands")
    assert compared.returncode == 0, compared.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {cell["entry"]: cell["status"] for cell in results["cells"]} == {"dgpo": "done", "reward-weighted": "done"}
    assert "reward-weighted" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("entry_points", "text", "message"),
    [
        (
            "[dgpo_plugin.algorithms]\ndgpo = outside_broken:Thing\n",
            "",
            "algorithm 'dgpo': dgpo-plugin and outside both bring one of that name; uninstall one of them",
        ),
        (
            "[dgpo_plugin.algorithms]\nbroken = outside_broken:Thing\n",
            "import nothing_of_that_name",
            "algorithm broken: outside_broken:Thing of the package outside cannot be imported "
            "(ModuleNotFoundError: No module named 'nothing_of_that_name'); mend or uninstall it",
        ),
        (
            "[dgpo_plugin.algorithms]\nbroken = outside_broken:Thing\n",
            "class Thing: pass",
            "broken names no AlgorithmConfig as its Config; see docs/adding-an-algorithm.md",
        ),
        (
            "[dgpo_plugin.algorithms]\nbroken = outside_broken:Thing\n",
            "from dgpo_plugin.algorithms import Algorithm, AlgorithmConfig\n"
            "class Thing(Algorithm):\n    Config = AlgorithmConfig\n"
            "    def sample(self, batch, random): ...\n    def gradient(self, rollout, advantages, random): ...\n",
            "algorithm broken: lacks cost; docs/adding-an-algorithm.md says what",
        ),
    ],
    ids=["collision", "import", "no configuration", "no cost"],
)
def test_what_is_wrong_with_another_package_is_one_line(
    entry_points: str, text: str, message: str, tmp_path: Path
) -> None:
    environment = outside.install(tmp_path, entry_points, outside_broken=text)
    done = dgpo(environment, "plan", "shapes", "--set", "algorithm.name=broken")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
