"""CONTRIBUTING.md, followed to the letter: its files are written, its lines added, its tests run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"


def section(title: str) -> list[tuple[str, str, str]]:
    """(language, file or nothing, text) of each block of code under a heading."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def with_lines_added(source: str, diff: str) -> str:
    """A file's text with a block's ``+`` lines after the lines that the block begins with, which it must have once."""
    lines = diff.splitlines()
    context = "".join(line[1:] + "\n" for line in lines if line.startswith(" "))
    added = "".join(line[1:] + "\n" for line in lines if line.startswith("+"))
    assert source.count(context) == 1, context
    return source.replace(context, context + added)


def follow(title: str, tree: Path) -> list[Path]:
    """Do what a section says in a copy of the library, and give its tests."""
    shutil.copytree(ROOT / "dgpo_plugin", tree / "dgpo_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", tree / "examples")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for language, name, text in section(title):
        file = tree / name
        if language == "sh":
            subprocess.run(text, shell=True, cwd=tree, check=True)
        elif language == "diff":
            file.write_text(with_lines_added(file.read_text(encoding="utf-8"), text), encoding="utf-8")
        else:
            assert not file.exists(), f"{name} is there already"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return [tree / name for _, name, _ in section(title) if name.startswith("tests/")]


def python(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "kind", "name"),
    [
        ("A reward", "rewards", "saturation"),
        ("A prompt set", "prompts", "weather/train"),
        ("An algorithm", "algorithms", "reward-weighted"),
    ],
)
def test_what_the_page_says_works(tmp_path: Path, title: str, kind: str, name: str) -> None:
    (test,) = follow(title, tmp_path)
    assert name in python(tmp_path, "-m", "dgpo_plugin", "list", kind, name)
    assert "1 passed" in python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))
    style = [str(tmp_path / file) for language, file, _ in section(title) if language == "python"]
    python(tmp_path, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *style)


@pytest.mark.fast
@pytest.mark.parametrize("title", ["A reward", "A prompt set", "An algorithm", "A model family", "A metric"])
def test_the_lines_to_add_have_their_place(title: str) -> None:
    diffs = [(name, text) for language, name, text in section(title) if language == "diff"]
    assert diffs
    for name, text in diffs:
        compile(with_lines_added((ROOT / name).read_text(encoding="utf-8"), text), name, "exec")
