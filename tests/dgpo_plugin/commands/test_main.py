"""The commands answer before torch is imported, and list what a configuration may name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dgpo_plugin.commands.main import COMMANDS, main
from dgpo_plugin.common.names import ALGORITHMS

pytestmark = pytest.mark.fast

HEAVY = ("accelerate", "diffusers", "numpy", "peft", "safetensors", "torch", "transformers")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def imported_by(code: str) -> list[str]:
    """Which of the heavy packages a new Python has after some code."""
    script = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: list[str] = eval(done.stdout.strip().splitlines()[-1])
    return found


def test_importing_the_commands_imports_nothing_heavy() -> None:
    modules = {target.partition(":")[0] for target in COMMANDS.values()}
    assert imported_by(f"import dgpo_plugin.commands, dgpo_plugin.commands.main, {', '.join(sorted(modules))}") == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list", "algorithms"], ["list", "presets"]])
def test_what_needs_no_model_is_answered_without_torch(arguments: list[str]) -> None:
    code = f"""
from click.testing import CliRunner
from dgpo_plugin.commands.main import main
done = CliRunner().invoke(main, {arguments!r})
assert done.exit_code == 0, done.output"""
    assert imported_by(code) == []


def test_help_names_every_command_and_each_says_what_its_options_are() -> None:
    told = run("--help").output
    for name in COMMANDS:
        assert f"  {name} " in told
    for name in ("train", "resume", "plan", "config", "sample", "score", "serve-reward", "worlds pretrain"):
        lines = run(*name.split(), "--help").output.splitlines()
        options = lines[lines.index("Options:") + 1 :]
        for line, following in zip(options, [*options[1:], ""], strict=True):
            if line.startswith("  -"):
                said = line.strip().split("  ", 1)[1:] or [following.strip()]
                assert len(said[0].split()) > 1, f"{name}: {line} says nothing"
                assert "Likewise" not in said[0]


def test_an_unknown_command_is_an_error() -> None:
    done = run("trian")
    assert done.exit_code == 2
    assert "No such command 'trian'" in done.output


def test_list_knows_algorithms_and_worlds() -> None:
    listed = run("list").output
    assert all(name in listed for name in ALGORITHMS)
    assert run("list", "algorithms").output.splitlines()[::2] == list(ALGORITHMS)
    assert run("list", "worlds").output.splitlines()[0] == "shapes"
    assert "shapes/held-out" in run("list", "worlds").output


@pytest.mark.parametrize(
    ("arguments", "there", "left_out"),
    [
        (["rewards", "hps*"], ["hpsv2", "hpsv2.1"], ["ocr", "imagereward"]),
        (["presets", "*-unguided"], ["shapes-unguided", "sd35-ocr-unguided"], ["shapes", "sd35-ocr"]),
        (["prompts", "ocr/*"], ["ocr/train", "ocr/test"], ["geneval/train"]),
        (["algorithms", "flow*"], ["flow-grpo", "flow-grpo-fast"], ["dgpo"]),
    ],
)
def test_a_pattern_keeps_what_it_matches(arguments: list[str], there: list[str], left_out: list[str]) -> None:
    names = [line for line in run("list", *arguments).output.splitlines() if not line.startswith(" ")]
    assert set(there) <= set(names)
    assert not set(left_out) & set(names)


def test_a_pattern_of_models_is_of_families_and_presets() -> None:
    rows = run("list", "models", "Flux2*").output.splitlines()[1:-1]
    assert [row.split()[:2] for row in rows] == [
        ["Flux2Pipeline", "flux2-dev-ocr"],
        ["Flux2KleinPipeline", "flux2-klein-ocr"],
    ]
    assert [row.split()[1] for row in run("list", "models", "sdxl-*").output.splitlines()[1:-1]] == ["sdxl-pickscore"]


def test_a_pattern_that_matches_nothing_names_the_near_one() -> None:
    done = run("list", "rewards", "hpsv3")
    assert done.exit_code == 2
    assert done.stderr.strip() == "error: list rewards: nothing matches 'hpsv3'; did you mean 'hpsv2'?"


def test_a_world_that_is_not_there_cannot_be_pretrained() -> None:
    done = run("worlds", "pretrain", "shape", "--output", "somewhere")
    assert done.exit_code == 2
    assert "no world 'shape'; did you mean 'shapes'?" in done.stderr


def test_a_world_is_pretrained_by_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr("dgpo_plugin.worlds.shapes.pretrain.pretrain", lambda *given: made.append(given))
    arguments = ["worlds", "pretrain", "shapes", "--output", str(tmp_path), "--seed", "3", "--no-compile"]
    assert run(*arguments).exit_code == 0
    assert run(*arguments, "--iterations", "5").exit_code == 0
    assert made == [(tmp_path, 3, None, False), (tmp_path, 3, 5, False)]
