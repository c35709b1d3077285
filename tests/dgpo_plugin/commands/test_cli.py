"""The `dgpo` command as a person uses it: what works end to end, and one clear line for what does not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.config.load import load_config, preset_names
from tests.conftest import SMALL

SMALL_FLAGS = [flag for override in SMALL for flag in ("--set", override)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2 and a single line on standard error that holds every part."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


@pytest.mark.fast
def test_train_sample_inspect(tmp_path: Path) -> None:
    output = tmp_path / "run"
    trained = run("train", "shapes", "--output", str(output), *SMALL_FLAGS)
    assert trained.exit_code == 0, trained.output
    assert "iteration    1" in trained.output
    assert "held-out reward" in trained.output
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2]
    assert (output / "config.yaml").exists()
    assert (output / "samples" / "000000.png").exists()
    adapter = output / "adapter.safetensors"
    card = run("inspect", str(adapter))
    assert card.exit_code == 0
    assert "dgpo" in card.output
    assert "reward before" in card.output
    grid = tmp_path / "deep" / "grid.png"
    drawn = run("sample", "shapes", "--adapter", str(adapter), "--prompt", "two red circles", "--count", "3",
                "--steps", "2", "--width", "64", "--height", "32", "--output", str(grid))  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(grid).size == (3 * 64 + 2 * 2, 32)
    assert_refused(run("train", "shapes", "--output", str(output), *SMALL_FLAGS), "holds a run already")
    assert not list(tmp_path.rglob("*.tmp*")), "temporary files are left behind"


@pytest.mark.fast
def test_run_from_its_own_config_file(tmp_path: Path) -> None:
    """A run's config.yaml is a complete configuration: training from it gives the same numbers."""
    first, second = tmp_path / "a", tmp_path / "b"
    assert run("train", "shapes", "--output", str(first), *SMALL_FLAGS).exit_code == 0
    assert run("train", str(first / "config.yaml"), "--output", str(second)).exit_code == 0

    def rewards(folder: Path) -> list[float]:
        return [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert rewards(first) == rewards(second)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "shape"], ["no preset 'shape'", "did you mean 'shapes'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["train", "shapes", "--set", "algorithm.betta=1"], ["unknown key algorithm.betta", "'beta'"]),
        (["train", "shapes", "--set", "trainning.seed=1"], ["unknown key trainning", "'training'"]),
        (["train", "shapes", "--set", "training.group_size=1"], ["training.group_size", "greater than or equal to 2"]),
        (["train", "shapes", "--set", "training.group_size=many"], ["training.group_size", "integer"]),
        (["train", "shapes", "--set", "training.group_size"], ["section.field=value"]),
        (["train", "shapes", "--set", "algorithm.name=dpgo"], ["no algorithm 'dpgo'", "'dgpo'"]),
        (["train", "shapes", "--set", "rewards=shape"], ["no reward 'shape'", "'shapes'"]),
        (["train", "shapes", "--set", "model.path=./nowhere"], ["./nowhere", "no such folder"]),
        (["train", "shapes", "--set", "prompts.train=shapes/trian"], ["'shapes/trian'", "'shapes/train'"]),
        (["train", "shapes", "--set", "prompts.train=missing.txt"], ["missing.txt"]),
    ],
)
def test_bad_train_input_is_one_line(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    assert_refused(run(*arguments, "--output", str(tmp_path / "run")), *parts)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


@pytest.mark.fast
def test_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    result = run("train", "shapes", "--output", str(tmp_path / "run"), "--set", f"prompts.train={tmp_path}/empty.txt")
    assert_refused(result, "empty.txt", "holds no prompt")


@pytest.mark.fast
def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(run("train", "shapes", "--output", str(tmp_path / "file" / "run")), "cannot write")
    result = run("sample", "shapes", "--prompt", "a circle", "--steps", "1", "--output", str(tmp_path / "file/x.png"))
    assert_refused(result, "cannot write")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sample", "shapes", "--prompt", "a circle", "--output", "x.jpg"], ["must end in .png"]),
        (["sample", "shapes", "--prompt", " ", "--output", "x.png"], ["--prompt"]),
        (["sample", "shapes", "--prompt", "a", "--width", "64", "--output", "x.png"], ["--width and --height", "both"]),
        (["sample", "shapes", "--prompt", "a", "--width", "64", "--height", "40", "--output", "x.png"], ["height 40"]),
        (["sample", "shapes", "--prompt", "a", "--adapter", "no.safetensors", "--output", "x.png"], ["no.safetensors"]),
        (["inspect", "no.safetensors"], ["no.safetensors"]),
    ],
)
def test_bad_sample_and_inspect_input_is_one_line(arguments: list[str], parts: list[str]) -> None:
    assert_refused(run(*arguments), *parts)


@pytest.mark.fast
def test_list_names_everything() -> None:
    listed = run("list").output
    for name in ("shapes", "shapes/train", "shapes/held-out", "shapes/out-of-domain"):
        assert name in listed
    models = run("list", "models").output
    assert all(family in models for family in FAMILIES)
    assert all(preset in models for preset in preset_names()), "make presets/memory.json again (tools/plan_presets.py)"


@pytest.mark.fast
def test_list_presets_says_what_is_published_and_what_is_not() -> None:
    told = re.split(r"\n(?=\S)", run("list", "presets").output.strip())
    says = {name: about for name, _, about in (one.partition("\n    ") for one in told)}
    assert list(says) == list(preset_names())
    assert all(says.values())
    for name, about in says.items():
        assert ("UNCONFIRMED" in about) == name.endswith("-unconfirmed"), name
        assert ("guess" in about) == name.endswith("-unconfirmed"), name
        if name.startswith("sd35-") and load_config(name).algorithm.name == "dgpo":
            nowhere = name in ("sd35-pickscore-unguided", "sd35-pickscore-old-policy")
            assert ("AN EXTRAPOLATION: nothing is published" in about) == nowhere, name
            assert ("DGPO's published settings" in about) != nowhere, name


@pytest.mark.slow
def test_ctrl_c_keeps_an_adapter(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dgpo_plugin.commands.main import main; main()", "train", "shapes"]
    small = [flag for override in SMALL if "iterations" not in override for flag in ("--set", override)]
    command += ["--output", str(tmp_path / "run"), *small, "--set", "training.iterations=100000"]
    # A shell's background job ignores SIGINT and hands that down; a person's foreground run does not.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("iteration    3"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert "reward after     -" in run("inspect", str(tmp_path / "run" / "adapter.safetensors")).output


@pytest.mark.fast
@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),  # what the CPU's allocator really says
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
        lambda: (_ for _ in ()).throw(torch.AcceleratorError("CUDA error: out of memory")),
        lambda: (_ for _ in ()).throw(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
        ),
        lambda: (_ for _ in ()).throw(torch.distributed.DistBackendError("Cuda failure 2 'out of memory'")),
    ],
)
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], object]
) -> None:
    def train(*given: object) -> None:
        list(result) if isinstance(result := allocate(), Iterator) else None

    monkeypatch.setattr("dgpo_plugin.training.run.train", train)
    result = CliRunner().invoke(main, ["train", "shapes", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "error: out of memory; set a smaller training.micro_batch_size" in result.output
    assert "Traceback" not in result.output


@pytest.mark.fast
def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*given: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("dgpo_plugin.training.run.train", train)
    result = CliRunner().invoke(main, ["train", "shapes", "--output", str(tmp_path / "run")])
    assert isinstance(result.exception, RuntimeError)
