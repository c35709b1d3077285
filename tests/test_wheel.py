"""The wheel holds what the tree holds: packages and data files are lists by hand in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"dgpo_plugin": "dgpo_plugin", "dgpo_bench": "bench"}
"""Folders by the names that they are installed under."""
EVIDENCE = ROOT / "bench" / "results"
"""What was measured: for readers of the repository, and no part of the program."""


def files_of_the_tree() -> set[str]:
    """What should be installed, by the path that it should have."""
    return {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
        if not path.is_relative_to(EVIDENCE)
    }


@pytest.mark.fast
def test_every_folder_of_modules_is_a_package_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {file.rpartition("/")[0].replace("/", ".") for file in files_of_the_tree() if file.endswith(".py")}
    assert listed == sorted(listed, key=lambda name: (name.split(".")[0] == "dgpo_bench", name))
    assert set(listed) == folders


@pytest.mark.slow
def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Could not find a version that satisfies the requirement setuptools" in done.stderr:
        pytest.skip("THE PACKAGE INDEX DOES NOT ANSWER: no wheel was built")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files_of_the_tree()
