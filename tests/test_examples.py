"""What users read in examples/ does run, in a tiny size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from click.testing import CliRunner
from PIL import Image

from dgpo_plugin.commands.main import main
from dgpo_plugin.training.pair_files import read_pairs
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def python(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_train_in_python(tmp_path: Path) -> None:
    done = python("train_in_python.py", str(tmp_path / "run"), *SMALL)
    assert done.returncode == 0, done.stderr
    before, *iterations, after, last = done.stdout.strip().splitlines()
    assert before.startswith("held-out reward of the base: ")
    assert [line.partition(":")[0] for line in iterations] == ["1", "2"]
    assert after.startswith("held-out reward of the adapter: ")
    card = CliRunner().invoke(main, ["inspect", last.removeprefix("adapter: ")]).output
    (shown,) = re.findall(r"^reward before +(\S+)$", card, re.MULTILINE)
    assert f"{float(shown):.3f}" == before.split()[-1]
    assert Image.open(tmp_path / "run" / "pictures.png").width > 4 * 64


@pytest.mark.slow
def test_a_mistake_in_it_is_one_line(tmp_path: Path) -> None:
    done = python("train_in_python.py", str(tmp_path / "run"), "training.sed=1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("unknown key training.sed; did you mean 'seed'?")


@pytest.mark.slow
def test_my_algorithm(tmp_path: Path) -> None:
    """Named by its file, it is planned, trained and gone on with as the others are."""
    named = f"algorithm.name={EXAMPLES / 'my_algorithm.py'}:RewardWeighted"
    changes = [change for change in (*SMALL, named) if not change.startswith("algorithm.") or change == named]
    options = [part for change in changes for part in ("--set", change)]
    planned = CliRunner().invoke(main, ["plan", "shapes", *options])
    assert planned.exit_code == 0, planned.output
    assert "8 images, 80 denoiser evaluations" in planned.output  # each 4 steps and 2 times 3
    trained = CliRunner().invoke(main, ["train", "shapes", "--output", str(tmp_path / "run"), *options])
    assert trained.exit_code == 0, trained.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["denoiser_evaluations"] for record in records] == [80, 80]
    longer = CliRunner().invoke(main, ["resume", str(tmp_path / "run"), "--iterations", "3"])
    assert longer.exit_code == 0, longer.output


@pytest.mark.fast
def test_my_reward(tmp_path: Path) -> None:
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    rewards = [f"{EXAMPLES / 'my_reward.py'}:{name}" for name in ("warmth", "Exposure")]
    output = tmp_path / "scores.csv"
    command = ["score", str(tmp_path), "--reward", ",".join(rewards), "--prompt", "a sunset", "--output", str(output)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    blue, red = (line.rsplit(",", 2) for line in output.read_text().splitlines()[1:])
    assert [float(value) for value in red[1:]] == pytest.approx([1, 5 / 6])
    assert [float(value) for value in blue[1:]] == pytest.approx([-1, 5 / 6])


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_files(path: Path) -> None:
    """It refuses keys that it does not know."""
    parsed = load_config_from_file(str(path))
    assert parsed.num_processes >= 2
    assert parsed.num_processes % parsed.num_machines == 0
    assert str(parsed.mixed_precision) == "no", "model.precision says it"


@pytest.mark.fast
def test_every_example_is_tested() -> None:
    said = Path(__file__).read_text(encoding="utf-8")
    assert all(path.name in said for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_make_pairs(tmp_path: Path) -> None:
    """What it writes is read as pairs, with nothing said of sizes."""
    done = python(
        "make_pairs.py", "shapes", "shapes/train", "shapes", str(tmp_path), "--prompts", "3", "--pictures", "3"
    )
    assert done.returncode == 0, done.stderr
    made = int(done.stdout.split()[0])
    assert done.stdout.strip() == f"{made} pairs of 3 prompts in {tmp_path}"
    pairs, lines = read_pairs(str(tmp_path), 64, 64)
    assert (len(pairs), lines) == (made, [])
