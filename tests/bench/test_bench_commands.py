"""The command line itself: what it refuses, and what it takes to say so."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from dgpo_bench.commands import main


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "shape"], "did you mean 'shapes"),
        (["compare", "shapes", "--algorithms", "dgpo,flowgrpo"], "did you mean 'flow-grpo'"),
        (["compare", "shapes", "--algorithms", ""], "no algorithm ''"),
        (["compare", "shapes", "--algorithms", "dgpo,"], "no algorithm ''"),
        (["compare", "shapes", "--size", "ful"], "choose quick, default or full; did you mean 'full'"),
        (["compare", "shapes", "--evaluations", "0"], "more than nothing"),
        (["compare", "shapes", "--controls", "zeros"], "no control 'zeros'; did you mean 'zero'"),
        (["compare", "shapes", "--only", "dgpo"], "--only dgpo: write it as ENTRY:SEED"),
        (["compare", "shapes", "--only", "dgpo:x"], "--only dgpo:x: write it as ENTRY:SEED"),
        (["validate", "genevall"], "no task 'genevall'; did you mean 'geneval'"),
        (["report", "nowhere"], "nowhere/results.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


SLOW = ("torch", "matplotlib", "diffusers", "transformers", "scipy")


@pytest.mark.fast
@pytest.mark.parametrize(
    "script",
    ["import dgpo_bench.commands", "from dgpo_bench.commands import main; main(['--help'], standalone_mode=False)"],
)
def test_help_needs_nothing_that_takes_long_to_import(script: str) -> None:
    script = f"{script}\nimport sys\nprint('imported:', *(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
